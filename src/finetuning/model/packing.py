"""How the examples of a packed batch stand in its one row, and which batch is being computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Packing:
    """How examples stand in one row of tokens.

    What depends on it is computed where the positions are: a copy of it would wait for the device.
    """

    lengths: tuple[int, ...]
    position_ids: torch.Tensor
    """(1, T), of every token in its example"""

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def one_by_one(self) -> bool:
        """Whether examples are attended to one after another; a GPU is faster on padded rows."""
        return self.position_ids.device.type == "cpu"

    @property
    def row_length(self) -> int:
        """Of padded rows: a kernel copies a mask, in every layer, whose rows are not aligned."""
        return -(-self.longest // 16) * 16

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """(examples + 1,) int32: where each example starts, and the end (`cu_seqlens`)."""
        is_start = self.position_ids[0] == 0
        starts = torch.nonzero_static(is_start, size=len(self.lengths))[:, 0]
        return F.pad(starts, (0, 1), value=len(is_start)).int()

    @cached_property
    def rows(self) -> torch.Tensor:
        """(T,): where every token is in the flattened padded rows."""
        positions = self.position_ids[0]
        example = (positions == 0).cumsum(0) - 1
        return example * self.row_length + positions

    @cached_property
    def masks(self) -> dict[tuple[int | None, torch.dtype], torch.Tensor]:
        """By window and number format: one mask for all layers, which keep it for backward."""
        return {}


class Current:
    """The packing of the batch that is being computed; None where each row is one sequence.

    A global, because BLOOM's forward drops every argument that it does not know: the packing cannot
    travel with the batch.
    """

    packing: Packing | None = None
    is_known = False
    """whether it was set, to None too"""


@contextmanager
def packed_as(packing: Packing | None) -> Iterator[None]:
    """Within, models attend by this packing.

    Must last until backward is done: activation checkpointing attends again there.
    """
    before = Current.packing, Current.is_known
    Current.packing, Current.is_known = packing, True
    try:
        yield
    finally:
        Current.packing, Current.is_known = before


def positions_of(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """(1, T) position_ids of examples in one row."""
    return torch.cat([torch.arange(length) for length in lengths])[None].to(device)
