"""FLOPs of a training step, by the shapes of the layers."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from finetuning.model.lora import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MatmulParams(NamedTuple):
    """How many numbers of a model's linear layers every token is multiplied by, and every response token by the head's.

    Embeddings are looked up and not multiplied, tied or not. Attention among the tokens is not counted.
    """

    layers: int
    trained: int
    """of these"""
    head: int
    trained_head: int

    def flops(self, tokens: float, responses: float, forwards: int = 1) -> float:
        """Of training on so many tokens, so many of them responses; two forwards where activations are checkpointed.

        Two FLOPs a number and token forward, two backward for the activations, and two for a trained weight's gradient.
        """
        per_token = 2 * ((forwards + 1) * self.layers + self.trained)
        return per_token * tokens + 2 * (2 * self.head + self.trained_head) * responses


def matmul_params_of(model: "PreTrainedModel") -> MatmulParams:
    """By the layers' shapes: a weight in 4 bits has half its numbers, and one that ZeRO-3 has shared out none."""

    def size(layer: torch.nn.Module) -> int:
        return (
            layer.nf * layer.nx
            if isinstance(layer, Conv1D)
            else layer.in_features * layer.out_features
        )

    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    sizes = [(size(layer), layer.weight.requires_grad) for layer in layers if layer is not head]
    taken = getattr(
        model.config.get_text_config(), "num_experts_per_tok", 1
    )  # of a mixture, by each token
    shapes = [(shape_of(weight), weight.requires_grad) for weight in model.parameters()]
    sizes += [
        (taken * shape[1] * shape[2], requires_grad)
        for shape, requires_grad in shapes
        if len(shape) == 3
    ]
    trained = sum(numbers for numbers, requires_grad in sizes if requires_grad)
    return MatmulParams(
        sum(numbers for numbers, _ in sizes),
        trained,
        size(head),
        size(head) if head.weight.requires_grad else 0,
    )
