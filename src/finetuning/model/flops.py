"""FLOPs of a training step, by the shapes of the layers."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from finetuning.model.last_block import row_by_row
from finetuning.model.lora import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MatmulParams(NamedTuple):
    """Weights of the linear layers (the N of 6ND), by the tokens that they are multiplied by.

    Embeddings are looked up and not multiplied, tied or not. Attention among tokens is not counted.
    """

    layers: int
    """by every token"""
    trained: int
    """of these"""
    last: int
    """by response tokens, or by every one with activation checkpointing: see last_block.py"""
    trained_last: int
    head: int
    """by response tokens"""
    trained_head: int

    def flops(self, tokens: float, responses: float, is_checkpointed: bool = False) -> float:
        """Of training on so many tokens, so many of them responses.

        Per weight and token two FLOPs forward, twice with checkpointing, two backward for the
        activations, and two for a trained weight's gradient.
        """
        forwards = 2 if is_checkpointed else 1
        layers = 2 * ((forwards + 1) * self.layers + self.trained)
        last = 2 * ((forwards + 1) * self.last + self.trained_last)
        head = 2 * (2 * self.head + self.trained_head)
        return (
            layers * tokens + last * (tokens if is_checkpointed else responses) + head * responses
        )


def matmul_params_of(model: "PreTrainedModel") -> MatmulParams:
    """By the layers' shapes: a 4-bit weight has half its numbers, one sharded by ZeRO-3 none."""
    head: Any = model.get_output_embeddings()
    narrow = {layer for module in row_by_row(model) for layer in module.modules()}
    layers: list[tuple[int, bool]] = []
    last: list[tuple[int, bool]] = []
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and layer is not head:
            (last if layer in narrow else layers).append((size_of(layer), is_trained(layer)))
    # Of a mixture of experts each token takes some.
    taken = getattr(model.config.get_text_config(), "num_experts_per_tok", 1)
    for weight in model.parameters():
        shape = shape_of(weight)
        if len(shape) == 3:
            layers.append((taken * shape[1] * shape[2], weight.requires_grad))
    heads = [(size_of(head), is_trained(head))]
    return MatmulParams(*total(layers), *total(last), *total(heads))


def total(sizes: list[tuple[int, bool]]) -> tuple[int, int]:
    """(all, trained)"""
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def size_of(layer: Any) -> int:
    if isinstance(layer, Conv1D):
        return int(layer.nf * layer.nx)
    return int(layer.in_features * layer.out_features)


def is_trained(layer: Any) -> bool:
    return bool(layer.weight.requires_grad)
