"""Examples -> the tensors of a batch, in one of two layouts.

    padded   [[1, 2, 3, 0],      packed   [[1, 2, 3, 4, 5]]      no padding; `lengths` (3, 2) and
              [4, 5, 0, 0]]               position_ids [[0, 1, 2, 0, 1]] tell examples apart

A batch is a set of examples: the layout never changes the loss.
"""

from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from finetuning.data.examples import IGNORE_INDEX, Example, sequences_of

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
    counts_of_pair, and reference (pairs, 4).
    """

    layout: str
    pad_token_id: int
    """fills padded rows; never attended to and never trained, so any id will do"""

    def __call__(self, examples: list[Example]) -> Batch:
        pairs, examples = examples, [part for each in examples for part in sequences_of(each)]
        labels = [example["labels"] for example in examples]
        trained = [np.flatnonzero(each != IGNORE_INDEX) for each in labels]
        # Nothing depends on an example's last target, nor on what stands behind it.
        lengths = [max(1, int(at.max(initial=1))) for at in trained]
        ids = [
            example["input_ids"][:length] for example, length in zip(examples, lengths, strict=True)
        ]
        if self.layout == "packed":
            starts = [0, *accumulate(lengths[:-1])]
            batch: dict[str, np.ndarray] = {
                "input_ids": np.concatenate(ids)[None],
                "position_ids": np.concatenate([np.arange(length) for length in lengths])[None],
            }
        else:
            longest = max(lengths)
            starts = [longest * number for number in range(len(examples))]
            padded = np.full((len(examples), longest), self.pad_token_id, np.int32)
            for row, each in zip(padded, ids, strict=True):
                row[: len(each)] = each
            batch = {"input_ids": padded}
        batch |= {
            # An example's first token is never trained, so the position before is of the same one.
            "positions": np.concatenate(
                [start + at - 1 for start, at in zip(starts, trained, strict=True)]
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
        return {**tensors, "lengths": lengths}


def counts_of_pair(chosen: int, rejected: int) -> tuple[int, int, int, int]:
    """How many trained tokens of each response lie within the length of the shorter one, and how
    many behind it: of the chosen response, then of the rejected.
    """
    shared = min(chosen, rejected)
    return shared, chosen - shared, shared, rejected - shared
