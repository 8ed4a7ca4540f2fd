"""The sections of a recipe: what may be said, in which unit, and which section owns what.

`training`, `lora` and `generation` take the fields of trl.SFTConfig, peft.LoraConfig and
transformers.GenerationConfig under their own names, so the libraries' manuals are ours. Nothing
here imports torch: a misspelt key is refused in a fraction of a second.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from finetuning.hub.address import MAX_NAME_LENGTH, PREFIX, REPO, SUBFOLDER, parse_address
from finetuning.recipe.library_sections import (
    GenerationConfigFields,
    LoraConfigFields,
    SFTConfigFields,
)
from finetuning.recipe.ownership import PREFERENCE_KEYS, REFUSED_LOSSES
from finetuning.section import Section
from finetuning.untrusted_text import TOO_SLOW, short_line, slow_patterns


class FromScratch(Section):
    """A model with random weights and a byte-level BPE tokenizer trained on the rows."""

    config: dict[str, Any]
    """fields of the transformers config, `model_type` among them"""
    vocab_size: int = Field(ge=257, le=2**20)
    """tokens in the vocabulary, at most; 256 bytes and the end mark are always there"""


class Model(Section):
    """The base model."""

    name: str | None = Field(default=None, min_length=1)
    """Hub id, local folder, or hub:owner/name/subfolder[@revision] for a model that was published
    from here"""
    revision: str | None = None
    """branch, tag or commit on the Hub"""
    adapter: str | None = Field(default=None, min_length=1)
    """LoRA adapter on `name` that training starts from and continues: a run folder, a checkpoint
    or hub:...; a `name` that is one is found to be"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """number format of the weights in memory; autocast (training.bf16, training.fp16) is on top of
    it. auto: float32, but under an adapter on a GPU the half format that the GPU computes in"""
    quantization: Literal["8bit", "4bit"] | None = None
    """hold the frozen base model in int8 or in 4-bit NormalFloat, by bitsandbytes; needs a lora
    section"""
    from_scratch: FromScratch | None = None
    """instead of `name`"""

    @model_validator(mode="after")
    def check(self) -> "Model":
        if (self.name is None) == (self.from_scratch is None):
            raise ValueError("exactly one of name and from_scratch must be given")
        if self.adapter and self.from_scratch:
            raise ValueError("adapter needs name: it was trained on other weights than random ones")
        for name in (self.name, self.adapter):
            if name and name.startswith(PREFIX):
                parse_address(name)
        if self.revision and self.name and self.name.startswith(PREFIX):
            raise ValueError(f"the revision of {PREFIX}... stands in model.name, behind an @")
        if self.quantization and self.from_scratch:
            raise ValueError("quantization needs name: random weights are not worth quantising")
        return self


class Publish(Section):
    """Where the finished run belongs on the Hub, and as what."""

    repo: str = Field(pattern=REPO, max_length=MAX_NAME_LENGTH)
    """Hub repository, owner/name"""
    subfolder: str = Field(pattern=SUBFOLDER, max_length=MAX_NAME_LENGTH)
    """folder in the repository, such as chapter05/sft_model: lower-case letters, digits, _ and -,
    single slashes"""
    merged: bool = False
    """of a LoRA run: full weights with the adapter merged in, instead of the adapter"""
    adapter: bool = False
    """with merged: the adapter too, in <subfolder>/adapter"""
    gguf: bool = False
    """beside the weights also model-f16.gguf for llama.cpp and a Modelfile for Ollama"""
    base_model: str | None = Field(default=None, pattern=REPO[:-1] + r"(@[\w./-]+)?$")
    """Hub id of the base model, owner/name[@revision], where model.name is a local copy of it"""
    data: str | None = Field(default=None, pattern=REPO)
    """Hub id of the data set, owner/name, where data.path is a local copy of it"""
    license: str | None = Field(default=None, min_length=1)
    """under which the weights are published, by the Hub's identifiers, such as apache-2.0 or
    cc-by-sa-3.0"""

    @model_validator(mode="after")
    def check(self) -> "Publish":
        if self.adapter and not self.merged:
            raise ValueError(
                "adapter goes with merged: true; without it the adapter is all that is published"
            )
        return self


NOT_OF_SFT_CONFIG = {
    "global_batch_size",
    "auto_find_batch_size",
    "early_stopping_patience",
    "early_stopping_threshold",
    "loraplus_lr_ratio",
    *PREFERENCE_KEYS,
}
"""settings of `training` that are ours, or that we do otherwise"""


class Training(SFTConfigFields):
    """Any field of trl.SFTConfig that no other section owns."""

    output_dir: str = Field(min_length=1, pattern=r"\S")
    """the run folder"""
    per_device_train_batch_size: int = Field(default=8, ge=1, le=10**6)
    """examples of a micro-batch on each device"""
    per_device_eval_batch_size: int | None = Field(default=None, ge=1, le=10**6)
    """examples evaluated at once; as in training if not given"""
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=10**6)
    """micro-batches of a step"""
    global_batch_size: int | None = Field(default=None, ge=1, le=10**9)
    """examples of a step over all processes; accumulation follows from it"""
    # Ours, because the library's multiplies by 0.9, keeps accumulation, and hangs if one process
    # runs out of memory.
    auto_find_batch_size: bool = False
    """out of memory before the first step: half the micro-batch, twice as many"""
    early_stopping_patience: int | None = Field(default=None, ge=1, le=10**6)
    """stop after so many evaluations without a better training.metric_for_best_model"""
    early_stopping_threshold: float = Field(default=0.0, ge=0, le=10**6)
    """by how much it has to be better to count"""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0, le=10**4)
    """LoRA+: how many times learning_rate an adapter's matrices B learn at, such as 16; by peft's
    optimizer"""
    # The library's default asks the device, in every micro-batch, for a loss that it replaces by
    # an average.
    logging_nan_inf_filter: bool = False
    """log the average of those before for a loss that is not a number"""
    learning_rate: float = Field(default=2e-5, ge=0, le=10)
    """at its highest"""
    dataloader_num_workers: int = Field(default=0, ge=0, le=1000)
    """processes that collate batches"""

    @field_validator("max_steps")
    @classmethod
    def check_max_steps(cls, steps: int) -> int:
        if steps == 0:
            raise ValueError("0 steps train nothing; -1 is as many as num_train_epochs has")
        return steps


# The losses of trl.DPOConfig that are made of log-probabilities alone, pair by pair.
LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
# Those that know chosen and rejected by the difference of their rewards.
OF_DIFFERENCE = {
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"),
}


class PreferenceTraining(Training):
    """Any field of trl.DPOConfig that no other section owns and that is supported."""

    learning_rate: float = Field(default=1e-6, ge=0, le=10)
    """at its highest"""
    beta: float = Field(default=0.1, gt=0, le=1000)
    """how strongly the model is held to the reference; ipo: its regularisation, tau"""
    loss_type: LossType | list[LossType] = "sigmoid"
    """what is minimised, or a list of losses that are added up by loss_weights; sigmoid is DPO"""
    loss_weights: list[Annotated[float, Field(ge=-1000, le=1000)]] | None = None
    """one for each of a list of loss_type; 1 if not given"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """robust: share of pairs whose preference is wrong, below 0.5; exo_pair: its epsilon, such as
    1e-3"""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """weight of the tokens of a response that are behind the length of the shorter one; null: 1"""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """how the distance to the reference is measured"""
    f_alpha_divergence_coef: float = Field(default=0.5, ge=-100, le=100)
    """f_divergence_type alpha_divergence: its alpha"""
    discopop_tau: float = Field(default=0.05, gt=0, le=1000)
    """loss_type discopop: its temperature"""
    disable_dropout: bool = True
    """dropout is off, in the model that is trained too"""

    @field_validator("loss_type", mode="before")
    @classmethod
    def check_loss_type(cls, given: Any) -> Any:
        for name in given if isinstance(given, list) else [given]:
            if isinstance(name, str) and name in REFUSED_LOSSES:
                raise ValueError(f"{name} is not supported: it {REFUSED_LOSSES[name]}")
        return given

    @property
    def loss_types(self) -> list[LossType]:
        return self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]

    @model_validator(mode="after")
    def check_losses(self) -> "PreferenceTraining":
        kinds = self.loss_types
        weights = len(kinds) if self.loss_weights is None else len(self.loss_weights)
        if not kinds or weights != len(kinds):
            raise ValueError(f"loss_weights: {weights} of them for {len(kinds)} of loss_type")
        if "robust" in kinds and self.label_smoothing >= 0.5:
            raise ValueError("label_smoothing: below 0.5 with loss_type robust")
        if "exo_pair" in kinds and not self.label_smoothing:
            raise ValueError("label_smoothing: above 0 with loss_type exo_pair, such as 1e-3")
        if self.f_divergence_type != "reverse_kl" and (others := {*kinds} - OF_DIFFERENCE):
            raise ValueError(
                f"f_divergence_type: {self.f_divergence_type} does not go with loss_type "
                f"{min(others)}, whose rewards do not only count by their difference"
            )
        return self


class Lora(LoraConfigFields):
    """Any field of peft.LoraConfig; the base model is then frozen."""

    @model_validator(mode="after")
    def check_patterns(self) -> "Lora":
        for name, pattern in slow_patterns(self.model_dump(exclude_unset=True)):
            raise ValueError(f"{name} is {short_line(pattern)}, {TOO_SLOW}")
        return self


class Evaluation(Section):
    """The answers to the evaluation set that are scored, of the base and the trained model."""

    questions: int | Literal["all"] = Field(default=50, ge=0, le=10**9)
    """how many responses of the evaluation set are asked for, always the same ones; all, or 0"""
    max_seconds: float = Field(default=60, gt=0, le=10**7)
    """after which no further question is asked before training; after it the same are asked"""


class Generation(GenerationConfigFields):
    """Any field of transformers.GenerationConfig, and the questions to ask."""

    prompts: list[str] = Field(default=[])
    """asked before and after training"""
    max_new_tokens: int = Field(default=128, ge=1, le=10**6)
    """tokens of an answer at most"""
    num_beams: int | None = Field(default=None, ge=1, le=1000)
    """beams of beam search; 1 is none"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """of sampled answers (do_sample: true)"""
