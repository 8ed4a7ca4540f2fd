"""Recipe -> base model."""

import os
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError, did_you_mean, is_out_of_memory, one_line
from finetuning.hub.allowed_files import MAX_LAYERS
from finetuning.model.location import location
from finetuning.model.precision import torch_dtype
from finetuning.model.quantization import (
    cast_inputs_to_autocast,
    disable_bnb_cpu_repacking,
    quantization_arguments,
)
from finetuning.model.weight_files import PICKLED, require_weight_files
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
    """The base model, every weight in model.dtype: on the CPU, or on the device if quantised.

    Raises UserError where it cannot be loaded, and where it embeds fewer tokens than its tokenizer
    has.
    """
    show_bars_of_long_work_only()
    disable_cudnn_attention()
    if model.from_scratch:
        return make_model(model, tokenizer, seed)
    loaded = read_model(model, device)
    disable_bnb_cpu_repacking(loaded)
    cast_inputs_to_autocast(loaded)
    embeddings: Any = loaded.get_input_embeddings()
    # It would keep the gradient from the EOS token where that is the pad token too.
    embeddings.padding_idx = None
    rows = embeddings.num_embeddings  # its weight is an empty shell under ZeRO-3
    if len(tokenizer) > rows:
        raise UserError(
            f"model.name: {model.name} embeds {rows} tokens, its tokenizer has {len(tokenizer)}"
        )
    return loaded


def show_bars_of_long_work_only() -> None:
    """transformers draws one for all weights that it reads or writes, also where nobody watches."""
    from transformers.utils.logging import set_tqdm_hook

    settings = {"delay": 3, "leave": False, "disable": None}  # after 3 s, in terminals
    set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, **settings}))


def disable_cudnn_attention() -> None:
    """torch prefers it on an H100: half a second for every new length, and wrong answers and
    gradients in half precision (pytorch#193893, pytorch#196678)."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def make_model(model: Model, tokenizer: "PreTrainedTokenizerFast", seed: int) -> "PreTrainedModel":
    """A model of model.from_scratch with random weights.

    Raises UserError for a config that no model can be made of.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, set_seed

    config = load_config(model, tokenizer)
    set_seed(seed)
    try:
        # Not from_config: under ZeRO-3 that fills each process's shard with other random numbers.
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        made: PreTrainedModel = kind(config).to(torch_dtype(model))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.from_scratch.config: {one_line(error)}") from None
    for settings in (made.config, made.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
    return made


def read_model(model: Model, device: "torch.device | str") -> "PreTrainedModel":
    """The model of model.name with all its weights.

    Raises UserError where it cannot be read, and where weights are missing or of another shape.
    """
    from transformers import AutoModelForCausalLM

    require_weight_files(model)
    # Where a repository has only pickles, transformers 5.23 would take the weights of an open pull
    # request, by anybody.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            location(model),
            revision=model.revision,
            dtype=torch_dtype(model),
            trust_remote_code=False,  # without it a question at the terminal runs a stranger's code
            use_safetensors=True,  # no pickles
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named in the loading info
            **quantization_arguments(model, device),
        )
    except Exception as error:  # of many kinds, where a config is odd
        if is_out_of_memory(error):
            raise
        if "cannot be loaded with `safetensors`" in str(error):
            raise UserError(f"model.name: {model.name} {PICKLED}") from None
        raise UserError(f"model.name: {model.name} cannot be loaded: {one_line(error)}") from None
    loaded: PreTrainedModel
    loaded, info = result
    # transformers fills these with random numbers.
    mismatched = (name for name, *_ in info["mismatched_keys"])
    if bad := sorted({*info["missing_keys"], *mismatched}):
        raise UserError(
            f"model.name: {model.name} lacks {len(bad)} of its weights, such as {bad[0]}, or has "
            "them in a shape that is not in its config"
        )
    return loaded


def load_config(model: Model, tokenizer: "PreTrainedTokenizerFast") -> Any:
    """The transformers config of the base model.

    Raises UserError where there is none, or one of more layers than any model has: making them,
    without weights too, would take hours.
    """
    place = "model.from_scratch.config" if model.from_scratch else f"model.name: {model.name}"
    config = (
        scratch_config(model.from_scratch, tokenizer) if model.from_scratch else read_config(model)
    )
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise UserError(f"{place}: num_hidden_layers is {layers:,}; at most {MAX_LAYERS:,}")
    return config


def read_config(model: Model) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            location(model), revision=model.revision, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, where a config is odd
        raise UserError(f"model.name: {model.name} has no config: {one_line(error)}") from None


def scratch_config(settings: FromScratch, tokenizer: "PreTrainedTokenizerFast") -> Any:
    """The transformers config. Raises UserError for a field that its model_type does not have."""
    from transformers import AutoConfig

    fields = dict(settings.config)
    end = tokenizer.eos_token_id
    # No pad token yet: a Llama would set its embedding, that of EOS, to zero and keep it there.
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
                hint = did_you_mean(name, names)
                raise UserError(f"{place}: unknown key {name} for model_type {kind}{hint}")
        return AutoConfig.for_model(kind, **{**fields, **special})
    except KeyError:
        raise UserError(f"{place}: model_type is missing, such as model_type: gpt2") from None
    except UserError:
        raise
    except Exception as error:  # of many kinds, huggingface_hub's strict dataclasses among them
        raise UserError(f"{place}: {one_line(error)}") from None


def fuse_gelu(model: "PreTrainedModel") -> None:
    """Replaces GPT-2's and BLOOM's GELU of eight kernels by torch's one (equal to 2e-7)."""
    from torch.nn import GELU
    from transformers.activations import NewGELUActivation
    from transformers.models.bloom.modeling_bloom import BloomGelu

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, BloomGelu)):
                setattr(module, name, GELU(approximate="tanh"))
