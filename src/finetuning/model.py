"""Recipe -> tokenizer, base model, LoRA settings, number format.

Torch and the model classes are imported where they are used: a recipe is checked and its rows are tokenized without
them.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.address import PREFIX, parse_address
from finetuning.errors import UserError, is_out_of_memory, one_line
from finetuning.quantization import NATIVE_BF16, keep_gradients, quantized
from finetuning.recipe import Recipe
from finetuning.sections import FromScratch, Model

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # the one special token of a tokenizer from scratch


def load_tokenizer(model: Model, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """The base model's tokenizer with a pad token; with `from_scratch` one trained on the texts.

    Raises UserError where there is none, or none that tokenizes in batches.
    """
    if model.from_scratch:
        return train_tokenizer(model.from_scratch, texts)
    return read_tokenizer(location(model), model.revision)


def location(model: Model) -> str:
    """What the libraries load it from: a Hub id or a folder; a checkpoint that was published from here is pulled."""
    if model.name.startswith(PREFIX):
        from finetuning.snapshot import cached_folder

        return str(cached_folder(parse_address(model.name)))
    return str(Path(model.name).expanduser())


def read_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a local folder or Hub id."""
    # AutoTokenizer imports torch (3 s) to find a class that knows what the files do not say.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, revision=revision)
    except (OSError, ValueError, TypeError):
        tokenizer = convert_tokenizer(name, revision)
    if tokenizer.eos_token is None:  # as in openai-community/gpt2, whose files name no special token
        tokenizer = convert_tokenizer(name, revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def convert_tokenizer(name: str, revision: str | None) -> "PreTrainedTokenizerFast":
    """A tokenizer as the Auto class makes it: without tokenizer.json (of a SentencePiece model, say), or of a class
    with special tokens of its own.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"model.name: {name} has no tokenizer that can be read: {one_line(error)}") from None
    # Of a folder without any vocabulary it makes a tokenizer that knows no text.
    known = tokenizer("a", add_special_tokens=False).input_ids
    if not known or tokenizer.unk_token_id in known:
        raise UserError(f"model.name: {name} has no tokenizer that can be read: its vocabulary is empty")
    if not tokenizer.is_fast:
        raise UserError(f"model.name: {name} has only a slow tokenizer; one that converts to tokenizer.json is needed")
    return tokenizer


def train_tokenizer(settings: FromScratch, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of at most vocab_size tokens; the same for the same texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def load_model(
    model: Model, tokenizer: "PreTrainedTokenizerFast", seed: int, device: "torch.device | str" = "cpu"
) -> "PreTrainedModel":
    """The base model, every weight in model.dtype, on the CPU; quantised, it is put on the device while it is read.

    Raises UserError where it cannot be had.
    """
    if model.from_scratch:
        return make_model(model, tokenizer, seed)
    loaded = read_model(model, device)
    keep_gradients(loaded)
    embeddings = loaded.get_input_embeddings()
    embeddings.padding_idx = None  # it would keep the gradient from the end mark where that is the pad token too
    rows = embeddings.num_embeddings  # its weight is an empty shell under ZeRO-3
    if len(tokenizer) > rows:
        raise UserError(f"model.name: {model.name} embeds {rows} tokens, its tokenizer has {len(tokenizer)}")
    return loaded


def make_model(model: Model, tokenizer: "PreTrainedTokenizerFast", seed: int) -> "PreTrainedModel":
    """A model of model.from_scratch, its weights random. Raises UserError where its config makes none."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, set_seed

    config = load_config(model, tokenizer)
    set_seed(seed)
    try:
        # Not from_config: under ZeRO-3 that fills each process's part with random numbers of its own.
        made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(getattr(torch, model.dtype))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.from_scratch.config: {one_line(error)}") from None
    made.config.pad_token_id = made.generation_config.pad_token_id = tokenizer.pad_token_id
    return made


def read_model(model: Model, device: "torch.device | str") -> "PreTrainedModel":
    """The model of model.name with all its weights. Raises UserError where it cannot be read, or lacks some."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            location(model),
            revision=model.revision,
            dtype=getattr(torch, model.dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in what is found
            **quantized(model, device),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"model.name: {model.name} cannot be loaded: {one_line(error)}") from None
    # transformers fills them with random numbers.
    if bad := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        what = f"{len(bad)} of its weights, such as {bad[0]}"
        raise UserError(f"model.name: {model.name} lacks {what}, or has them in a shape that is not in its config")
    return loaded


def load_config(model: Model, tokenizer: "PreTrainedTokenizerFast") -> Any:
    """The transformers config of the base model. Raises UserError where there is none."""
    if model.from_scratch:
        return scratch_config(model.from_scratch, tokenizer)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(location(model), revision=model.revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name: {model.name} has no config: {one_line(error)}") from None


def scratch_config(settings: FromScratch, tokenizer: "PreTrainedTokenizerFast") -> Any:
    """The transformers config. Raises UserError for a field that its model_type does not have."""
    from transformers import AutoConfig

    fields = dict(settings.config)
    end = tokenizer.eos_token_id
    # No pad token yet: a Llama would make its embedding, that of the end mark, zero and keep it there.
    special = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    place = "model.from_scratch.config"
    try:
        known = AutoConfig.for_model(kind := fields.pop("model_type"))
        names = [*known.to_dict(), *known.attribute_map]
        for name in fields:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise UserError(f"{place}: unknown key {name} for model_type {kind}; did you mean {near}?")
        return AutoConfig.for_model(kind, **{**fields, **special})
    except KeyError:
        raise UserError(f"{place}: model_type is missing, such as model_type: gpt2") from None
    except UserError:
        raise
    except Exception as error:  # of many kinds, huggingface_hub's strict dataclasses among them
        raise UserError(f"{place}: {one_line(error)}") from None


def fuse_gelu(model: "PreTrainedModel") -> None:
    """Puts torch's one-kernel GELU in place of GPT-2's and BLOOM's eight: the same function (to 2e-7)."""
    from torch.nn import GELU
    from transformers.activations import NewGELUActivation
    from transformers.models.bloom.modeling_bloom import BloomGelu

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, BloomGelu)):
                setattr(module, name, GELU(approximate="tanh"))


def lora_config(recipe: Recipe) -> "LoraConfig | None":
    """What peft needs to put an adapter on the base model, or None for full fine-tuning."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump(exclude_unset=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {one_line(error)}") from None


def require_modules(model: "PreTrainedModel", lora: dict[str, Any]) -> None:
    """Raises UserError for a listed name that no module has: peft leaves it out in silence if it finds another one.

    Not for a mixture of experts: peft still takes the names that they had before they became one parameter.
    """
    if any(len(shape_of(weight)) == 3 for weight in model.parameters()):
        return
    modules = dict(model.named_modules())
    for field in ("target_modules", "exclude_modules"):
        listed = lora.get(field)
        for name in listed if isinstance(listed, list) else ():
            if not any(f".{module}".endswith(f".{name}") for module in modules):
                own = {module.rpartition(".")[2] for module, found in modules.items() if hasattr(found, "weight")}
                near = difflib.get_close_matches(name, sorted(own), n=1, cutoff=0.0)[0]
                kind = model.config.model_type
                raise UserError(f"lora.{field}: no module of the {kind} model is called {name}; did you mean {near}?")


def shape_of(weight: "torch.Tensor") -> tuple[int, ...]:
    """(out, in), or (experts, out, in) for a mixture; of what ZeRO-3 has shared out, too, whose shell is empty."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def precision(recipe: Recipe, device: "torch.device", capability: tuple[int, int] | None) -> dict[str, bool]:
    """{bf16, fp16} for the trainer: what the recipe says, else what the device computes in hardware.

    `capability` is the CUDA compute capability: bf16 from 8.0 on. torch.cuda.is_bf16_supported() is of no use, it says
    yes on a T4 (7.5), which emulates; and trl turns bf16 on everywhere, 70 times slower on a CPU without it. Raises
    UserError for what cannot work.
    """
    bf16, fp16, dtype = recipe.training.bf16, recipe.training.fp16, recipe.model.dtype
    is_gpu = device.type == "cuda"
    lacks_bf16 = is_gpu and capability < NATIVE_BF16
    this = f"this GPU (compute capability {'.'.join(map(str, capability))})" if is_gpu else "the CPU"
    if bf16 and fp16:
        raise UserError("training.bf16 and training.fp16 are both true; at most one can be")
    if fp16 and not is_gpu:
        raise UserError("training.fp16: the CPU has no fp16 training (it would silently be float32); leave it out")
    if bf16 and lacks_bf16:
        raise UserError(f"training.bf16: {this} only emulates it; use training.fp16=true")
    if dtype == "bfloat16" and lacks_bf16:
        raise UserError(f"model.dtype: bfloat16, which {this} only emulates; use float32, or float16 with lora")
    if bf16 is None and not fp16:
        bf16, fp16 = is_gpu and not lacks_bf16, lacks_bf16
    if dtype == "float16" and not fp16:
        raise UserError(f"model.dtype: float16 needs the loss scaling of fp16, which is off on {this}; use float32")
    return {"bf16": bool(bf16), "fp16": bool(fp16)}
