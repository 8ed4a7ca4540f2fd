"""Packed examples as padded rows, and back: without a copy of what is padding."""

from collections.abc import Callable
from typing import Any

import torch

from finetuning.model.packing import Packing


class Scatter(torch.autograd.Function):
    """(T, ...) -> (size, ...): each row where the index says, zeros elsewhere.

    It and Gather are each other's backward: no place is taken twice. Autograd knows neither; that
    of x[index] sorts the index, in every layer, for q, k and v.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
        ctx.index = index
        whole: torch.Tensor = rows.new_zeros(size, *rows.shape[1:])
        return whole.index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        return grads[0].index_select(0, ctx.index), None, None


class Gather(torch.autograd.Function):
    """(size, ...) -> (T, ...): the rows that the index names."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.index, ctx.size = index, len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        whole: torch.Tensor = grad.new_zeros(ctx.size, *grad.shape[1:])
        return whole.index_copy_(0, ctx.index, grad), None


scatter: Callable[..., torch.Tensor] = Scatter.apply
gather: Callable[..., torch.Tensor] = Gather.apply


def pad(packed: torch.Tensor, index: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(1, H, T, D), and where each is in the flattened rows (T,) -> (examples, H, row_length, D),
    zero elsewhere.
    """
    count, length = len(packing.lengths), packing.row_length
    rows = scatter(packed[0].transpose(0, 1), index, count * length)
    return rows.view(count, length, *rows.shape[1:]).transpose(1, 2)


def unpad(rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(examples, H, row_length, D) -> (1, H, T, D)"""
    packed = gather(rows.transpose(1, 2).flatten(0, 1), packing.rows)
    return packed.transpose(0, 1)[None]
