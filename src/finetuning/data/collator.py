"""Examples -> the tensors of a batch, in one of two layouts.

    padded   [[1, 2, 3, 0],      packed   [[1, 2, 3, 4, 5]]      no padding; `lengths` (3, 2) and
              [4, 5, 0, 0]]               position_ids [[0, 1, 2, 0, 1]] tell examples apart

A batch is a set of examples: the layout never changes the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetuning.data.examples import IGNORE_INDEX, Example, Ids, sequences_of

Batch = dict[str, Any]


@dataclass(frozen=True)
class Collator:
    """A list of examples -> the inputs of a model and of the loss.

    input_ids (1, T) packed or (B, T) padded, of each example the tokens that a target depends on;
    position_ids (1, T) packed only; positions (N,) of the N hidden states, flattened, that predict
    a trained token; targets (N,), those tokens; lengths, of each example in input_ids. No attention
    mask: packed examples are told apart by lengths, and causal attention never looks at padding on
    the right.

    A pair is two examples, first that with the chosen response; then also counts (4 * pairs,), see
    counts_of_pair, and reference (pairs, 4). Packed, the second stands there without what both
    begin with: shared, how many tokens each example begins with that stand in the one before, and
    keys, see keys_of.
    """

    layout: str
    pad_token_id: int
    """fills padded rows; never attended to and never trained, so any id will do"""

    def __call__(self, examples: list[Example]) -> Batch:
        pairs, examples = examples, [part for each in examples for part in sequences_of(each)]
        labels = [example["labels"] for example in examples]
        trained = [np.flatnonzero(each != IGNORE_INDEX) for each in labels]
        # Nothing depends on an example's last target, nor on what stands behind it.
        ends = [max(1, int(at.max(initial=1))) for at in trained]
        begins = list(map(min, self.shared_tokens(pairs), (end - 1 for end in ends)))
        lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
        ids = [
            example["input_ids"][begin:end]
            for example, begin, end in zip(examples, begins, ends, strict=True)
        ]
        if self.layout == "packed":
            starts = [0, *accumulate(lengths[:-1])]
            batch = packed_row(ids, begins)
        else:
            starts = [max(lengths) * number for number in range(len(ids))]
            batch = {"input_ids": padded_rows(ids, self.pad_token_id)}
        batch |= {
            # An example's first token is never trained, so the position before is of the same one.
            "positions": np.concatenate(
                [
                    start + at - 1 - begin
                    for start, at, begin in zip(starts, trained, begins, strict=True)
                ]
            ),
            "targets": np.concatenate([each[at] for each, at in zip(labels, trained, strict=True)]),
        }
        if "chosen" in pairs[0]:
            sizes = list(map(len, trained))
            groups = map(counts_of_pair, sizes[::2], sizes[1::2])
            batch["counts"] = np.array(list(chain.from_iterable(groups)))
        tensors = {name: torch.as_tensor(array.astype(np.int64)) for name, array in batch.items()}
        if "reference" in pairs[0]:
            reference = np.stack([each["reference"] for each in pairs])
            tensors["reference"] = torch.as_tensor(reference)
        return {**tensors, "lengths": lengths, "shared": begins}

    def shared_tokens(self, examples: list[Example]) -> list[int]:
        """Of every sequence, how many of its first tokens stand in the one before it alone."""
        if "chosen" not in examples[0]:
            return [0] * len(examples)
        is_packed = self.layout == "packed"
        return [count for each in examples for count in (0, each["shared"] * is_packed)]


def packed_row(ids: list[Ids], begins: Sequence[int]) -> dict[str, NDArray[Any]]:
    """One row of these sequences, each without so many of its first tokens; see Collator."""
    lengths = list(map(len, ids))
    positions = [
        np.arange(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)
    ]
    row: dict[str, NDArray[Any]] = {
        "input_ids": np.concatenate(ids)[None],
        "position_ids": np.concatenate(positions)[None],
    }
    return {**row, "keys": keys_of(lengths, begins)} if any(begins) else row


def padded_rows(ids: list[Ids], pad_token_id: int) -> Ids:
    """(sequences, T of the longest), filled on the right."""
    padded = np.full((len(ids), max(map(len, ids))), pad_token_id, np.int32)
    for row, each in zip(padded, ids, strict=True):
        row[: len(each)] = each
    return padded


def keys_of(lengths: Sequence[int], shared: Sequence[int]) -> NDArray[np.int64]:
    """(K,) tokens of a packed row that its examples attend to, one example after another: those
    that it shares with the one before, then its own.
    """
    starts = [0, *accumulate(lengths)]
    parts = [
        np.arange(start, start + count)
        for before, own, length, begin in zip([0, *starts], starts, lengths, shared, strict=False)
        for start, count in ((before, begin), (own, length))
    ]
    return np.concatenate(parts)


def counts_of_pair(chosen: int, rejected: int) -> tuple[int, int, int, int]:
    """How many trained tokens of each response lie within the length of the shorter one, and how
    many behind it: of the chosen response, then of the rejected.
    """
    shared = min(chosen, rejected)
    return shared, chosen - shared, shared, rejected - shared
