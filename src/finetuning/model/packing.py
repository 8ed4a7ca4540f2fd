"""How the examples of a packed batch stand in its one row, and which batch is being computed.

The second response of a pair stands there without what both sequences of the pair begin with: it
attends to it where it is, so that a prompt is computed once (prefix sharing, Wang and Hegde 2024,
https://arxiv.org/abs/2410.20305).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F

from finetuning.data.collator import Batch, keys_of


@dataclass(frozen=True)
class Packing:
    """How examples stand in one row of tokens.

    What depends on it is computed where the positions are: a copy of it would wait for the device.
    """

    lengths: tuple[int, ...]
    position_ids: torch.Tensor
    """(1, T), of every token in its example"""
    shared: tuple[int, ...] = ()
    """how many tokens each example begins with that stand in the example before, and not in its own
    place; none of any, if empty"""
    keys: torch.Tensor | None = None
    """(K,) where any are shared: tokens that examples attend to, one example after another"""

    @classmethod
    def of(cls, batch: Batch) -> Self | None:
        """That of a collated batch; None where its rows are padded."""
        if "position_ids" not in batch:
            return None
        lengths, shared = tuple(batch["lengths"]), tuple(batch["shared"])
        return cls(lengths, batch["position_ids"], shared, batch.get("keys"))

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Tokens of each example, those that it shares included."""
        if self.keys is None:
            return self.lengths
        return tuple(map(sum, zip(self.lengths, self.shared, strict=True)))

    @property
    def longest(self) -> int:
        return max(self.key_lengths)

    @property
    def one_by_one(self) -> bool:
        """Whether examples are attended to one after another; a GPU is faster on padded rows."""
        return self.position_ids.device.type == "cpu"

    @property
    def row_length(self) -> int:
        """Of padded rows: a kernel copies a mask, in every layer, whose rows are not aligned."""
        return -(-self.longest // 16) * 16

    def attended(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., T, D) -> (..., K, D): what the examples attend to."""
        return tokens if self.keys is None else tokens.index_select(-2, self.keys)

    @cached_property
    def is_start(self) -> torch.Tensor:
        """(T,) whether a token is the first of its example that stands in its place."""
        positions = self.position_ids[0]
        return positions != F.pad(positions[:-1] + 1, (1, 0), value=-1)

    @cached_property
    def key_positions(self) -> torch.Tensor:
        """(K,) position_ids of the keys: 0 of the first of each example."""
        return self.attended(self.position_ids[0, :, None])[:, 0]

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """(examples + 1,) int32: where each example starts, and the end (`cu_seqlens`)."""
        return boundaries_of(self.is_start, len(self.lengths))

    @cached_property
    def key_boundaries(self) -> torch.Tensor:
        """(examples + 1,) int32: the same of the keys."""
        return boundaries_of(self.key_positions == 0, len(self.lengths))

    @cached_property
    def rows(self) -> torch.Tensor:
        """(T,): where every token is in the flattened padded rows."""
        example = self.is_start.cumsum(0) - 1
        return example * self.row_length + self.position_ids[0]

    @cached_property
    def key_rows(self) -> torch.Tensor:
        """(K,): the same of the keys."""
        example = (self.key_positions == 0).cumsum(0) - 1
        return example * self.row_length + self.key_positions

    @cached_property
    def masks(self) -> dict[tuple[int | None, torch.dtype], torch.Tensor]:
        """By window and number format: one mask for all layers, which keep it for backward."""
        return {}


def boundaries_of(is_start: torch.Tensor, examples: int) -> torch.Tensor:
    """(tokens,) -> (examples + 1,) int32"""
    starts = torch.nonzero_static(is_start, size=examples)[:, 0]
    return F.pad(starts, (0, 1), value=len(is_start)).int()


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


def pack(
    lengths: Sequence[int], device: torch.device, shared: Sequence[int] | None = None
) -> Packing:
    """Examples of so many tokens in one row, and how many more each shares with the one before."""
    begins = shared or [0] * len(lengths)
    parts = [torch.arange(n, n + length) for n, length in zip(begins, lengths, strict=True)]
    keys = torch.as_tensor(keys_of(lengths, begins)).to(device) if any(begins) else None
    return Packing(tuple(lengths), torch.cat(parts)[None].to(device), tuple(begins), keys)
