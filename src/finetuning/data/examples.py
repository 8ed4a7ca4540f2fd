"""Tokenized examples: the ids and labels that are trained on, one after another in flat arrays."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100  # label of a token that is left out of the loss; torch's default

Ids = NDArray[np.int32]
Counts = NDArray[np.int64]


class Example(TypedDict):
    """One sequence of T tokens; of a pair two, the second without what both begin with."""

    input_ids: Ids  # (T,)
    labels: Ids  # (T,), IGNORE_INDEX where the token is not trained
    chosen: NotRequired[int]
    """of a pair: tokens of the sequence with the chosen response, behind which the other begins"""
    shared: NotRequired[int]
    """of a pair: tokens that both sequences begin with: the prompt, but for its last token, from
    which each predicts its own response"""
    reference: NotRequired[NDArray[np.float32]]
    """of a pair in preference tuning: (4,) log-probabilities; see training/reference.py"""


@dataclass(frozen=True)
class Examples:
    """Tokenized examples, one after another in flat arrays."""

    input_ids: Ids  # (tokens of all examples,)
    labels: Ids  # (tokens of all examples,)
    lengths: Counts  # (examples,)
    rows: Counts  # (examples,) number of the row an example was made from
    chosen: Counts | None = None  # (examples,) of pairs: see Example
    shared: Counts | None = None  # (examples,) the same

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        for number, (start, end) in enumerate(
            zip(self.ends - self.lengths, self.ends, strict=True)
        ):
            yield self.example(number, slice(start, end))

    def example(self, number: int, tokens: slice) -> Example:
        """The example of this number, which has these tokens."""
        example: Example = {"input_ids": self.input_ids[tokens], "labels": self.labels[tokens]}
        if self.chosen is not None and self.shared is not None:
            example["chosen"] = int(self.chosen[number])
            example["shared"] = int(self.shared[number])
        return example

    @property
    def ends(self) -> Counts:
        """(examples,) where in the flat arrays each example ends."""
        return np.cumsum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.sequence_lengths.max(initial=0))

    @property
    def sequence_lengths(self) -> Counts:
        """(examples, 1) tokens of each sequence; (examples, 2) of pairs."""
        if self.chosen is None or self.shared is None:
            return self.lengths[:, None]
        return np.stack([self.chosen, self.lengths - self.chosen + self.shared], 1)

    def select(self, numbers: Counts, max_length: int | None = None) -> "Examples":
        """The examples of these numbers, in this order, with repeats; cut to max_length tokens."""
        starts = (self.ends - self.lengths)[numbers]
        lengths = np.minimum(self.lengths[numbers], max_length or np.inf).astype(np.int64)
        tokens = ranges(starts, lengths)
        chosen, shared = (
            None if each is None else each[numbers] for each in (self.chosen, self.shared)
        )
        rows = self.rows[numbers]
        return Examples(self.input_ids[tokens], self.labels[tokens], lengths, rows, chosen, shared)

    @property
    def widths(self) -> Counts:
        """(examples,) slots in a padded batch where the example is the widest: as many sequences as
        it has, each as long as its longest."""
        lengths = self.sequence_lengths
        widths: Counts = lengths.max(1) * lengths.shape[1]
        return widths

    def in_pairs(self) -> "Examples":
        """Every two sequences, of which each has a trained token, as the one example that they are.

        What they share is there once, so that it is computed once where the layout is packed.
        """
        starts, trained = self.ends - self.lengths, np.flatnonzero(self.labels != IGNORE_INDEX)
        prompts = trained[np.searchsorted(trained, starts)] - starts
        shared = np.maximum(prompts.reshape(-1, 2).min(1) - 1, 0)
        once, again = (ranges(starts[half::2], shared) for half in (0, 1))
        assert np.array_equal(self.input_ids[once], self.input_ids[again])
        lengths = self.lengths.reshape(-1, 2)
        return Examples(
            np.delete(self.input_ids, again),
            np.delete(self.labels, again),
            lengths.sum(1) - shared,
            self.rows[::2],
            chosen=lengths[:, 0],
            shared=shared,
        )


def sequences_of(example: Example) -> list[Example]:
    """The example itself; of a pair, the sequence with the chosen and that with the rejected."""
    if "chosen" not in example:
        return [example]
    chosen, shared = example["chosen"], example["shared"]
    ids, labels = example["input_ids"], example["labels"]
    first: Example = {"input_ids": ids[:chosen], "labels": labels[:chosen]}
    second: Example = {
        "input_ids": np.concatenate([ids[:shared], ids[chosen:]]),
        "labels": np.concatenate([labels[:shared], labels[chosen:]]),
    }
    return [first, second]


def train_on_all(examples: Examples) -> Examples:
    """The same examples with every token trained but the first, which is never predicted."""
    labels = examples.input_ids.copy()
    labels[first_tokens(examples.lengths)] = IGNORE_INDEX
    return replace(examples, labels=labels)


def first_tokens(lengths: Counts) -> Counts:
    """Where in the flat arrays the examples begin that have a token."""
    starts: Counts = (np.cumsum(lengths) - lengths)[lengths > 0]
    return starts


def ranges(starts: Counts, lengths: Counts) -> Counts:
    """start, start + 1, ... start + length - 1 of each, one after another (sum of lengths,)."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def sums(values: Counts, counts: Counts) -> Counts:
    """The sum of the first counts[0] values, of the next counts[1], and so on (counts,)."""
    totals = np.append(0, np.cumsum(values))
    ends = np.cumsum(counts)
    summed: Counts = totals[ends] - totals[ends - counts]
    return summed
