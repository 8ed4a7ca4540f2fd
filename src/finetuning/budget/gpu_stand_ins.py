"""What only a GPU or bitsandbytes does, stood in for on the CPU, for its memory alone.

Used by step_memory.py, which runs a training step on fake tensors of the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from finetuning.model import loss
from finetuning.model.packing import Packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER_NORM, ATTENTION = F.layer_norm, F.scaled_dot_product_attention


class PaddedPacking(Packing):
    """Attention as on a GPU: not one example after another, but in padded rows."""

    one_by_one = False


@contextmanager
def gpu_kernels(is_half: bool) -> Iterator[None]:
    """Within, operations of the CPU take the memory that those of a GPU take.

    CUDA's autocast computes layer norms in float32; dropout keeps a mask of one byte a number, that
    of fused attention nothing; half-precision products are added to a float32 sum by one kernel.
    """
    kernels: dict[str, Any] = {"dropout": dropout, "scaled_dot_product_attention": attention}
    if is_half:
        kernels["layer_norm"] = layer_norm
    with mock.patch.multiple(F, **kernels), mock.patch.object(loss, "add_product", add_nothing):
        yield


def layer_norm(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return LAYER_NORM(hidden.float(), *args, **kwargs)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    return ATTENTION(query, key, value, attn_mask, 0.0, **kwargs)


def dropout(
    hidden: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
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
