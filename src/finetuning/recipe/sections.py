"""The sections of a recipe: what may be said, in which unit, and which section owns what.

`training`, `lora` and `generation` take the fields of trl.SFTConfig, peft.LoraConfig and transformers.GenerationConfig
under their own names, so the libraries' manuals are ours. Nothing here imports torch: a misspelt key is refused in a
fraction of a second.
"""

from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from finetuning.hub.address import LONGEST, PREFIX, REPO, SUBFOLDER, parse_address
from finetuning.recipe.library_fields import load_library_fields, python_type
from finetuning.section import Section

# Fields of the libraries that another section owns (or that nobody may set), with the owner.
OWNED = {
    "training": {
        **dict.fromkeys(("max_length", "truncation_mode"), "data.max_length and data.overflow"),
        **dict.fromkeys(
            ("packing", "packing_strategy", "padding_free", "eval_packing"), "data.layout"
        ),
        **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "data.loss_on"),
        **dict.fromkeys(
            ("dataset_text_field", "dataset_kwargs", "chat_template_path", "eos_token"),
            "data.template",
        ),
        **dict.fromkeys(
            ("dataset_num_proc", "shuffle_dataset", "remove_unused_columns"), "the data section"
        ),
        **dict.fromkeys(("label_names", "pad_token", "pad_to_multiple_of"), "data.layout"),
        **dict.fromkeys(("train_sampling_strategy", "length_column_name"), "data.order"),
        **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "the model section"),
        **dict.fromkeys(
            ("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push"),
            "the publish section",
        ),
        **dict.fromkeys(("hub_private_repo", "hub_revision"), "the publish section"),
        "hub_token": "the environment variable HF_TOKEN",
        **dict.fromkeys(
            ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), "accelerate_configs/"
        ),
        **dict.fromkeys(("local_rank", "accelerator_config"), "accelerate_configs/"),
        **dict.fromkeys(
            ("label_smoothing_factor", "loss_type", "router_aux_loss_coef"),
            "the loss: plain cross-entropy",
        ),
        "average_tokens_across_devices": "the loss: every trained token of a step weighs the same, on all processes",
        **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "the loss: fused without it"),
        "dataloader_drop_last": "data.order: an epoch has every example once",
        **dict.fromkeys(
            (
                "resume_from_checkpoint",
                "save_only_model",
                "ignore_data_skip",
                "enable_jit_checkpoint",
            ),
            "the run folder: the same command again goes on exactly where the run stopped",
        ),
        **dict.fromkeys(
            ("restore_callback_states_from_checkpoint", "save_on_each_node"),
            "the run folder: one, that every machine sees",
        ),
        **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the script that is run"),
        "eval_on_start": "data.eval: what is held out is evaluated before the first step, to compare with",
    },
    "lora": {
        **dict.fromkeys(("base_model_name_or_path", "revision"), "model.name and model.revision"),
        **dict.fromkeys(
            ("task_type", "peft_type", "peft_version", "inference_mode", "auto_mapping"),
            "src/sft.py",
        ),
        "runtime_config": "src/sft.py",
    },
    "generation": {
        "max_length": "generation.max_new_tokens",
        **dict.fromkeys(
            ("num_return_sequences", "return_dict_in_generate"),
            "src/generate.py: an answer a question",
        ),
        "is_assistant": "src/generate.py: the model answers by itself",
        **dict.fromkeys(
            ("stop_strings", "token_healing"), "data.template: answers end where its responses end"
        ),
    },
}


# Keys that the libraries renamed or dropped, or that live here under another name, with what to write instead.
RENAMED = {
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "load_in_8bit": "model.quantization: 8bit",
    "load_in_4bit": "model.quantization: 4bit",
    "use_peft": "a lora section",
    "lora_r": "lora.r",
    "dataset_name": "data.path",
    "max_seq_length": "data.max_length",
    "warmup_ratio": "training.warmup_steps (a number below 1 is a share of all steps)",
    "evaluation_strategy": "training.eval_strategy",
    "group_by_length": "data.order: by_length",
    "gradient_checkpointing": "training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "training.activation_checkpointing_kwargs",
    "no_cuda": "training.use_cpu",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "overwrite_output_dir": "another training.output_dir (the key is gone: a run folder is never overwritten)",
    "save_safetensors": "nothing (the key is gone: weights are always safetensors)",
    "logging_dir": "nothing (the key is gone: logs go to <training.output_dir>/runs)",
    "push_to_hub_model_id": "publish.repo",
}


class FromScratch(Section):
    """A model with random weights and a byte-level BPE tokenizer trained on the rows."""

    config: dict[str, Any]
    """fields of the transformers config, `model_type` among them"""
    vocab_size: int = Field(ge=257)
    """tokens in the vocabulary, at most; 256 bytes and the end mark are always there"""


class Model(Section):
    """The base model."""

    name: str | None = Field(default=None, min_length=1)
    """Hub id, local folder, or hub:owner/name/subfolder[@revision] for a checkpoint that was published from here"""
    revision: str | None = None
    """branch, tag or commit on the Hub"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """number format of the weights in memory; autocast (training.bf16, training.fp16) is on top of it"""
    quantization: Literal["8bit", "4bit"] | None = None
    """hold the frozen base model in int8 or in 4-bit NormalFloat, by bitsandbytes; needs a lora section"""
    from_scratch: FromScratch | None = None
    """instead of `name`"""

    @model_validator(mode="after")
    def check(self) -> "Model":
        if (self.name is None) == (self.from_scratch is None):
            raise ValueError("exactly one of name and from_scratch must be given")
        if self.name and self.name.startswith(PREFIX):
            parse_address(self.name)
            if self.revision:
                raise ValueError(f"the revision of {PREFIX}... stands in model.name, behind an @")
        if self.quantization and self.from_scratch:
            raise ValueError("quantization needs name: random weights are not worth quantising")
        return self


class Publish(Section):
    """Where the finished run belongs on the Hub, and as what."""

    repo: str = Field(pattern=REPO, max_length=LONGEST)
    """Hub repository, owner/name"""
    subfolder: str = Field(pattern=SUBFOLDER, max_length=LONGEST)
    """folder in the repository, such as chapter05/sft_model: lower-case letters, digits, _ and -, single slashes"""
    merged: bool = False
    """of a LoRA run: full weights with the adapter merged in, instead of the adapter"""
    adapter: bool = False
    """with merged: the adapter too, in <subfolder>/adapter"""
    base_model: str | None = Field(default=None, pattern=REPO[:-1] + r"(@[\w./-]+)?$")
    """Hub id of the base model, owner/name[@revision], where model.name is a local copy of it"""
    license: str | None = Field(default=None, min_length=1)
    """under which the weights are published, by the Hub's identifiers, such as apache-2.0 or cc-by-sa-3.0"""

    @model_validator(mode="after")
    def check(self) -> "Publish":
        if self.adapter and not self.merged:
            raise ValueError(
                "adapter goes with merged: true; without it the adapter is all that is published"
            )
        return self


def library_section(section: str, doc: str, **own_fields: Any) -> type[Section]:
    """A Section with the fields a library's config class has, less those owned elsewhere or renamed, and our own."""
    fields = {
        name: (python_type(field), Field(default=field["default"], description=field["help"]))
        for name, field in load_library_fields()[section].items()
        if name not in OWNED[section] and name not in RENAMED
    }
    return create_model(
        section.capitalize(), __base__=Section, __doc__=doc, **{**fields, **own_fields}
    )


Training = library_section(
    "training",
    "Any field of trl.SFTConfig that no other section owns.",
    output_dir=(str, Field(min_length=1, description="the run folder")),
    # The library's own fields, with bounds that it does not check.
    per_device_train_batch_size=(
        int,
        Field(default=8, ge=1, description="examples of a micro-batch on each device"),
    ),
    per_device_eval_batch_size=(
        int | None,
        Field(
            default=None,
            ge=1,
            description="examples evaluated at once; as in training if not given",
        ),
    ),
    gradient_accumulation_steps=(
        int,
        Field(default=1, ge=1, description="micro-batches of a step"),
    ),
    global_batch_size=(
        int | None,
        Field(
            default=None,
            ge=1,
            description="examples of a step over all processes; accumulation follows from it",
        ),
    ),
    # Ours, because the library's multiplies by 0.9, keeps accumulation, and hangs if one process runs out of memory.
    auto_find_batch_size=(
        bool,
        Field(
            default=False,
            description="out of memory before the first step: half the micro-batch, twice as many",
        ),
    ),
    # The library's default asks the device, in every micro-batch, for a loss that it replaces by an average.
    logging_nan_inf_filter=(
        bool,
        Field(
            default=False,
            description="log the average of those before for a loss that is not a number",
        ),
    ),
    learning_rate=(float, Field(default=2e-5, ge=0, description="at its highest")),
    dataloader_num_workers=(
        int,
        Field(default=0, ge=0, description="processes that collate batches"),
    ),
)


Lora = library_section("lora", "Any field of peft.LoraConfig; the base model is then frozen.")


Generation = library_section(
    "generation",
    "Any field of transformers.GenerationConfig, and the questions to ask.",
    prompts=(list[str], Field(default=[], description="asked before and after training")),
    max_new_tokens=(int, Field(default=128, ge=1, description="tokens of an answer at most")),
    num_beams=(
        int | None,
        Field(default=None, ge=1, description="beams of beam search; 1 is none"),
    ),
    seed=(int, Field(default=0, description="of sampled answers (do_sample: true)")),
)
