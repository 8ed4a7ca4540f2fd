"""What only a GPU or bitsandbytes does, stood in for on the CPU, for its memory alone.

Used by step_memory.py, which runs a training step on fake tensors of the CPU.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from finetuning.model import loss
from finetuning.model.attention import Packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PaddedPacking(Packing):
    """Attention as on a GPU: not one example after another, but in padded rows."""

    one_by_one = False


class GpuKernels(TorchFunctionMode):
    """Within, operations of the CPU take the memory that those of a GPU take.

    CUDA's autocast computes layer norms in float32; dropout keeps a mask of one byte a number, that
    of fused attention nothing; half-precision products are added to a float32 sum by one kernel.
    """

    def __init__(self, is_half: bool) -> None:
        super().__init__()
        self.is_half = is_half

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.layer_norm and self.is_half:
            args, kwargs = torch.utils._pytree.tree_map_only(
                torch.Tensor, torch.Tensor.float, (args, kwargs)
            )
        if func is F.dropout:
            return dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:])
        return func(*args, **kwargs)

    def __enter__(self) -> Any:
        self.add_product = loss.add_product
        loss.add_product = add_nothing
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        loss.add_product = self.add_product
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def dropout(
    hidden: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """F.dropout as CUDA has it."""
    return torch.native_dropout(hidden, p, training)[0] if training and p else hidden


def add_nothing(*args: Any, **kwargs: Any) -> None:
    """loss.add_product on a GPU, which allocates nothing."""


def quantize_linear_layers(model: "PreTrainedModel", bits: int) -> None:
    """Puts QuantizedLinearStandIn where bitsandbytes has its layers: everywhere but the head."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (torch.nn.Linear, Conv1D)) and child is not head:
                setattr(module, name, QuantizedLinearStandIn(child, bits))


class QuantizedLinearStandIn(torch.nn.Linear):
    """A frozen linear layer in 8 or 4 bits, whose weight is there in full only to multiply."""

    def __init__(self, layer: Any, bits: int) -> None:
        rows, columns = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
        super().__init__(columns, rows)
        self.bias = layer.bias
        # 8 bits: a float32 scale a row. 4 bits: an 8-bit scale for 64 weights, and a float32 one
        # for 256 of those.
        count = rows * columns
        size = count + 4 * rows if bits == 8 else count // 2 + count // 64 + count // 4096
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return quantized_matmul(hidden_states, self.out_features, self.bias)


class QuantizedMatMulStandIn(torch.autograd.Function):
    """The memory of bitsandbytes' products: (..., C) -> (..., out), in autocast's format if any.

    They keep their input in that format, and have the weight in it too while they multiply.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, out: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.dtype = hidden.dtype
        if torch.is_autocast_enabled("cpu"):
            hidden = hidden.to(torch.get_autocast_dtype("cpu"))
        ctx.hidden, ctx.out = hidden, out
        weight = hidden.new_empty(out, hidden.shape[-1])
        with torch.autocast("cpu", enabled=False):
            return F.linear(hidden, weight, None if bias is None else bias.to(hidden))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, None, None]:
        (grad,) = grad_outputs
        weight = grad.new_empty(ctx.out, ctx.hidden.shape[-1])
        return (grad @ weight).to(ctx.dtype), None, None


quantized_matmul: Callable[..., torch.Tensor] = QuantizedMatMulStandIn.apply
