"""Recipe -> base model."""

import difflib
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError, is_out_of_memory, one_line
from finetuning.model.location import location
from finetuning.model.quantization import disable_bnb_cpu_repacking, quantized
from finetuning.recipe.sections import FromScratch, Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_model(
    model: Model,
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
    device: "torch.device | str" = "cpu",
) -> "PreTrainedModel":
    """The base model, every weight in model.dtype, on the CPU; quantised, it is put on the device while it is read.

    Raises UserError where it cannot be had.
    """
    if model.from_scratch:
        return make_model(model, tokenizer, seed)
    loaded = read_model(model, device)
    disable_bnb_cpu_repacking(loaded)
    embeddings = loaded.get_input_embeddings()
    embeddings.padding_idx = (
        None  # it would keep the gradient from the end mark where that is the pad token too
    )
    rows = embeddings.num_embeddings  # its weight is an empty shell under ZeRO-3
    if len(tokenizer) > rows:
        raise UserError(
            f"model.name: {model.name} embeds {rows} tokens, its tokenizer has {len(tokenizer)}"
        )
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
        raise UserError(
            f"model.name: {model.name} lacks {what}, or has them in a shape that is not in its config"
        )
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
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
    }
    place = "model.from_scratch.config"
    try:
        known = AutoConfig.for_model(kind := fields.pop("model_type"))
        names = [*known.to_dict(), *known.attribute_map]
        for name in fields:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise UserError(
                    f"{place}: unknown key {name} for model_type {kind}; did you mean {near}?"
                )
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
