"""The last block computes only the positions that predict a response token, behind its attention.

Its keys and values need every position. What follows is computed row by row, and the head looks at
the response positions alone: 3 % of GPT-2's FLOPs on dolly, more where responses are short.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from finetuning.model.lora import shape_of

# What architectures call the parts of a block.
ATTENTION = ("attn", "self_attn", "self_attention")
PROJECTION = ("c_proj", "o_proj", "dense")
MLP = ("mlp",)


class LastBlock:
    """A model's last block, whose attention projection and MLP can be kept to some positions.

    Of an architecture with other names, and of a mixture of experts, whose MLP returns more than
    hidden states, nothing is changed.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.positions: torch.Tensor | None = None
        self.block = last_block(model)
        for module in row_by_row(model):
            module.forward = self.narrowed(module.forward)

    @contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """Within, of the flattened (B * T) positions only these are computed; others are zero."""
        # With activation checkpointing the block is computed again in backward, outside of this.
        is_checkpointed = getattr(self.block, "gradient_checkpointing", False)
        self.positions = None if is_checkpointed else positions
        try:
            yield
        finally:
            self.positions = None

    def narrowed(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def narrow(*inputs: torch.Tensor) -> torch.Tensor:
            """Each input (B, T, C) -> (B, T, C)"""
            if self.positions is None:
                return forward(*inputs)
            shape = inputs[0].shape[:-1]
            rows = [x.flatten(0, -2).index_select(0, self.positions)[None] for x in inputs]
            output = forward(*rows)[0]
            whole = output.new_zeros(shape.numel(), output.shape[-1])
            return whole.index_copy(0, self.positions, output).view(*shape, -1)

        return narrow


def row_by_row(model: torch.nn.Module) -> list[Any]:
    """The last block's attention projection and MLP; none where they are not known."""
    block = last_block(model)
    is_mixture = any(len(shape_of(weight)) == 3 for weight in model.parameters())
    if block is None or is_mixture:
        return []
    found = [child(child(block, ATTENTION), PROJECTION), child(block, MLP)]
    return [module for module in found if module is not None]


def last_block(model: torch.nn.Module) -> Any:
    """None for a model without a list of blocks."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)[-1] if lists else None


def child(module: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
