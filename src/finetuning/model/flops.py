"""FLOPs of a training step, by the shapes of the layers."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from finetuning.model.lora import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MatmulParams(NamedTuple):
    """Weights of the linear layers (the N of 6ND); the head's count for response tokens only.

    Embeddings are looked up and not multiplied, tied or not. Attention among tokens is not counted.
    """

    layers: int
    trained: int
    """of these"""
    head: int
    trained_head: int

    def flops(self, tokens: float, responses: float, forwards: int = 1) -> float:
        """Of training on so many tokens, so many of them responses.

        Per weight and token two FLOPs forward, two backward for the activations, and two for a
        trained weight's gradient. `forwards` is 2 where activations are checkpointed.
        """
        per_token = 2 * ((forwards + 1) * self.layers + self.trained)
        return per_token * tokens + 2 * (2 * self.head + self.trained_head) * responses


def matmul_params_of(model: "PreTrainedModel") -> MatmulParams:
    """By the layers' shapes: a 4-bit weight has half its numbers, one sharded by ZeRO-3 none."""
    head: Any = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, (torch.nn.Linear, Conv1D))]
    sizes = [(size_of(layer), is_trained(layer)) for layer in linear if layer is not head]
    # Of a mixture of experts each token takes some.
    taken = getattr(model.config.get_text_config(), "num_experts_per_tok", 1)
    for weight in model.parameters():
        shape = shape_of(weight)
        if len(shape) == 3:
            sizes.append((taken * shape[1] * shape[2], weight.requires_grad))
    layers = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    return MatmulParams(layers, trained, size_of(head), size_of(head) * is_trained(head))


def size_of(layer: Any) -> int:
    if isinstance(layer, Conv1D):
        return int(layer.nf * layer.nx)
    return int(layer.in_features * layer.out_features)


def is_trained(layer: Any) -> bool:
    return bool(layer.weight.requires_grad)
