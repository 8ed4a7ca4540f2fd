"""What only a GPU or bitsandbytes does, stood in for on the CPU, for its memory alone.

Used by step_memory.py, which runs a training step on fake tensors of the CPU.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from finetuning.model.attention import Packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PaddedPacking(Packing):
    """Attention as on a GPU: not one example after another, but in padded rows."""

    one_by_one = False


class LayerNormInFloat32(TorchFunctionMode):
    """CUDA's autocast computes layer norms in float32; the CPU's, used here, does not."""

    def __init__(self, is_on: bool) -> None:
        super().__init__()
        self.is_on = is_on

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.is_on and func is F.layer_norm:
            args, kwargs = torch.utils._pytree.tree_map_only(
                torch.Tensor, torch.Tensor.float, (args, kwargs)
            )
        return func(*args, **(kwargs or {}))


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
    """The memory of bitsandbytes' MatMul8bitFp and MatMul4Bit: (..., C) -> (..., out).

    Autocast does not reach them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, out: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.hidden, ctx.out = hidden, out
        weight = hidden.new_empty(out, hidden.shape[-1])
        with torch.autocast("cpu", enabled=False):
            return F.linear(hidden, weight, None if bias is None else bias.to(hidden))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, None, None]:
        (grad,) = grad_outputs
        return grad @ grad.new_empty(ctx.out, ctx.hidden.shape[-1]), None, None


quantized_matmul: Callable[..., torch.Tensor] = QuantizedMatMulStandIn.apply
