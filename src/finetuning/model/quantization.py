"""Base models in 8 or 4 bits, by bitsandbytes, under an adapter in float32.

Every function here that changes a model is for a measured defect of the libraries and names it.
"""

import logging
import sys
from typing import TYPE_CHECKING, Any

from finetuning.model.precision import NATIVE_BF16, torch_dtype
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def hide_bitsandbytes(recipe: Recipe) -> None:
    """Keeps peft from importing bitsandbytes (1 to 2 s of every start) where a run has no use.

    Where it does, keeps it from warning, for every layer, that it casts the input.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    optim = recipe.training.optim
    if recipe.model.quantization is None and optim.startswith(("adamw_torch", "adafactor", "sgd")):
        modules: dict[str, Any] = sys.modules
        modules.setdefault("bitsandbytes", None)  # to Python and to peft: not installed


def quantization_arguments(model: Model, device: "torch.device | str") -> dict[str, Any]:
    """What from_pretrained needs to quantise each layer as it is read; nothing for a plain model.

    The output layer stays plain, and embeddings keep their format: peft's
    prepare_model_for_kbit_training would make them float32, which costs bloomz-1b1 0.7 GiB on a
    float16 base and gains nothing where they are frozen.
    """
    if model.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    if model.quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:  # the settings of QLoRA, https://arxiv.org/abs/2305.14314
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(model, device),
        )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def cast_inputs_to_autocast(model: "PreTrainedModel") -> None:
    """Has 8-bit layers multiply in autocast's format.

    Autocast leaves norms in float32 and does not reach bitsandbytes' product, whose backward is in
    the format of its input: nine tenths of a step's backward, off a GPU's tensor cores.
    """

    def cast(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        import torch

        device = inputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return inputs
        return (inputs[0].to(torch.get_autocast_dtype(device)), *inputs[1:])

    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(cast)


def disable_bnb_cpu_repacking(model: "PreTrainedModel") -> None:
    """Lets gradients pass through 4-bit layers on the CPU after the model has generated.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks their weights in the first forward pass in
    evaluation, for a product without a backward. Measured: where the model answers before training,
    a Llama's adapter on q_proj never moves.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def compute_dtype(model: Model, device: "torch.device | str") -> "torch.dtype":
    """The format in which 4-bit weights are multiplied: on a GPU its fast one.

    Autocast does not reach them, and bitsandbytes' default is float32.
    """
    import torch

    if torch.device(device).type != "cuda":
        return torch_dtype(model)
    has_bf16 = torch.cuda.get_device_capability(device) >= NATIVE_BF16
    return torch.bfloat16 if has_bf16 else torch.float16
