"""bf16, fp16 or float32."""

from typing import TYPE_CHECKING

from finetuning.errors import UserError
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Model

if TYPE_CHECKING:
    import torch


NATIVE_BF16 = (8, 0)  # compute capability from which a GPU computes bfloat16 in hardware


def precision(
    recipe: Recipe, device: "torch.device", capability: tuple[int, int] | None
) -> dict[str, bool]:
    """{bf16, fp16} for the trainer: what the recipe says, else what the device has hardware for.

    `capability` is the CUDA compute capability, None on a CPU; from 8.0 on a GPU has bf16.
    torch.cuda.is_bf16_supported() is of no use: it is true on a T4 (7.5), which emulates. trl turns
    bf16 on everywhere, 70 times slower on a CPU without it. Raises UserError for what cannot work.
    """
    bf16, fp16, dtype = recipe.training.bf16, recipe.training.fp16, recipe.model.dtype
    is_gpu = capability is not None and device.type == "cuda"
    lacks_bf16 = capability is not None and is_gpu and capability < NATIVE_BF16
    version = ".".join(map(str, capability or ()))
    name = f"this GPU (compute capability {version})" if is_gpu else "the CPU"
    assert not (bf16 and fp16), "refused by launch/compatibility.py"
    if fp16 and not is_gpu:
        raise UserError(
            "training.fp16: the CPU has no fp16 training (it would silently be float32); "
            "leave it out"
        )
    if bf16 and lacks_bf16:
        raise UserError(f"training.bf16: {name} only emulates it; use training.fp16=true")
    if dtype == "bfloat16" and lacks_bf16:
        raise UserError(
            f"model.dtype: bfloat16, which {name} only emulates; use float32, or float16 with lora"
        )
    if bf16 is None and not fp16:
        bf16, fp16 = is_gpu and not lacks_bf16, lacks_bf16
    if dtype == "float16" and not fp16:
        raise UserError(
            f"model.dtype: float16 needs the loss scaling of fp16, which is off on {name}; "
            "use float32"
        )
    return {"bf16": bool(bf16), "fp16": bool(fp16)}


def with_weight_format(
    recipe: Recipe, device: "torch.device | str", formats: dict[str, bool]
) -> Model:
    """recipe.model, its dtype decided.

    `auto` is float32, but for the frozen base of an adapter on a GPU the format that the GPU
    computes in: a float32 one would be cast in every forward pass, and takes twice the memory.
    """
    if recipe.model.dtype != "auto":
        return recipe.model
    half = "bfloat16" if formats["bf16"] else "float16" if formats["fp16"] else "float32"
    is_gpu = str(device).startswith("cuda")
    dtype = half if recipe.lora and is_gpu else "float32"
    return recipe.model.model_copy(update={"dtype": dtype})


def torch_dtype(model: Model) -> "torch.dtype":
    """Of the weights; `auto` outside of training is float32."""
    import torch

    dtype: torch.dtype = getattr(torch, "float32" if model.dtype == "auto" else model.dtype)
    return dtype
