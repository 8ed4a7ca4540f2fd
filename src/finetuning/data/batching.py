"""Examples -> batches: which examples meet in a step, and their layout in memory.

    padded   [[1, 2, 3, 0],      packed   [[1, 2, 3, 4, 5]]      no padding; `lengths` (3, 2) and
              [4, 5, 0, 0]]               position_ids [[0, 1, 2, 0, 1]] tell examples apart

A batch is a set of examples: the layout never changes the loss. Neither does the number of
processes: they divide the examples of one seeded order among them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetuning.data.bin_packing import ceil_div, pack_lengths
from finetuning.data.examples import IGNORE_INDEX, Example, Examples, sequences_of

Batch = dict[str, Any]
Numbers = NDArray[np.int64]  # (n,) numbers of examples

SEARCHED = 2**21  # examples, about three seconds' worth, among which the largest batch is sought
WINDOW = 50  # steps whose examples are sorted together when grouping by length


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


class ExampleSet(torch.utils.data.Dataset[Example]):
    """Examples by number. Number ~n (negative) is example n as a dummy, with no token to train.

    A dummy example goes to a rank that has none left in the last batch of an epoch, so that every
    rank runs the same number of batches.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        # Summed once; a list of all examples instead takes 0.4 s and 84 MiB for 200,000.
        self.ends = examples.ends

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        is_dummy = number < 0
        at = dummy_of(number) if is_dummy else number
        tokens = slice(self.ends[at] - self.examples.lengths[at], self.ends[at])
        example = self.examples.example(at, tokens)
        if is_dummy:
            example["labels"] = np.full_like(example["labels"], IGNORE_INDEX)
        return example


class PairSet(ExampleSet):
    """Pairs, each with the log-probabilities of its responses under the reference."""

    def __init__(self, examples: Examples) -> None:
        super().__init__(examples)
        # Not a number until it is known: a pair without it would be noticed at once.
        self.reference = np.full((len(examples), 4), np.nan, np.float32)

    def __getitem__(self, number: int) -> Example:
        at = dummy_of(number) if number < 0 else number
        return {**super().__getitem__(number), "reference": self.reference[at]}


@dataclass
class BatchSampler:
    """The numbers of the examples of every micro-batch of one process, epoch by epoch.

    A step takes batch_size * processes * accumulation examples; or, with `tokens`, as many as fill
    processes * accumulation bins of that many tokens. They are divided so that every process has
    about the same number of tokens.
    """

    lengths: NDArray[np.int64]  # (examples,)
    batch_size: int
    """examples of a micro-batch"""
    tokens: int | None = None
    """tokens of a micro-batch at most, instead of batch_size"""
    processes: int = 1
    process: int = 0
    accumulation: int = 1
    """micro-batches of a step"""
    seed: int | None = None
    """of the order; None keeps the order of the examples"""
    by_length: bool = False
    """examples of similar length meet in a step; the order of the steps stays random"""
    widths: NDArray[np.int64] | None = None
    """(examples,) slots of an example in a padded batch where it is the widest; its length if not
    given"""
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def longest(self, micro_batches: int, is_padded: bool) -> list[int]:
        """The examples of the largest micro-batch that any process gets among its first so many.

        Where looking at all of them would take long, a micro-batch at least as large: of the
        longest examples there are. Bins of `tokens` are as full in every epoch.
        """
        if self.tokens:
            micro_batches = min(micro_batches, len(self))
        elif micro_batches * self.batch_size * self.processes > SEARCHED:
            count = min(self.batch_size, len(self.lengths))
            sizes = self.widths if is_padded and self.widths is not None else self.lengths
            longest: Numbers = np.argpartition(-sizes, count - 1)[:count]
            return [*longest.tolist()]
        largest, found = (0, 0), [0]
        for epoch in range(ceil_div(micro_batches, len(self))):
            micro_batches_left = micro_batches - epoch * len(self)
            of_epoch = replace(self, epoch=epoch).micro_batches()
            for part in chain.from_iterable(islice(of_epoch, micro_batches_left)):
                width = self.width(part)
                size = (width * len(part) if is_padded else int(self.lengths[part].sum()), width)
                if size > largest:
                    largest, found = size, part.tolist()
        return found

    def computed_tokens(self, is_padded: bool) -> int:
        """Tokens computed in an epoch by all processes, padding included."""
        if not is_padded:
            return int(self.lengths.sum())
        parts = chain.from_iterable(self.micro_batches())
        return sum(self.width(part) * len(part) for part in parts)

    def width(self, part: Numbers) -> int:
        """Slots that each example of a padded batch takes."""
        widths = self.lengths if self.widths is None else self.widths
        return int(widths[part].max(initial=0))

    def __len__(self) -> int:
        """Micro-batches of an epoch, the same for every process and epoch."""
        return self.length

    @cached_property
    def length(self) -> int:
        if self.tokens:
            bins = int(pack_lengths(self.lengths, self.tokens).max()) + 1
            return ceil_div(bins, self.processes)
        return ceil_div(len(self.lengths), self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        for parts in self.micro_batches():
            part = parts[self.process]
            yield part.tolist() if len(part) else [dummy_of(int(parts[0][0]))]

    def micro_batches(self) -> Iterator[list[Numbers]]:
        """Every micro-batch of the epoch, as one array of numbers for each process."""
        random = np.random.default_rng((self.seed, self.epoch)) if self.seed is not None else None
        if self.tokens:
            for bins in self.steps(self.bins(self.tokens, random), self.processes, random):
                missing = [np.empty(0, np.int64)] * (-len(bins) % self.processes)
                yield from in_groups([*bins, *missing], self.processes)
        else:
            size = self.batch_size * self.processes
            for step in self.steps(self.order(random), size, random):
                parts = self.balance_tokens(step, ceil_div(len(step), size) * self.processes)
                yield from in_groups(parts, self.processes)

    def steps(
        self, units: Numbers | list[Numbers], micro_batch: int, random: np.random.Generator | None
    ) -> Iterator[Any]:
        """The units (numbers of examples, or bins of them) of each optimizer step."""
        size = micro_batch * self.accumulation
        order = np.arange(ceil_div(len(units), size))
        if self.by_length and random is not None:
            # The last step stays last: it may be smaller, and accumulation needs whole ones before.
            order[:-1] = random.permutation(len(order) - 1)
        for number in order.tolist():
            yield units[number * size : (number + 1) * size]

    def order(self, random: np.random.Generator | None) -> Numbers:
        if random is None:
            return np.arange(len(self.lengths))
        order = random.permutation(len(self.lengths))
        if self.by_length:
            window = WINDOW * self.batch_size * self.processes * self.accumulation
            for start in range(0, len(order), window):
                part = order[start : start + window]
                order[start : start + window] = part[np.argsort(-self.lengths[part], kind="stable")]
        return order

    def bins(self, tokens: int, random: np.random.Generator | None) -> list[Numbers]:
        """The examples in bins of at most `tokens`, in random order.

        Examples of the same length change places from epoch to epoch.
        """
        order = self.order(random) if random is None else random.permutation(len(self.lengths))
        bin_of = pack_lengths(self.lengths[order], tokens)
        by_bin = np.argsort(bin_of, kind="stable")
        bins = np.split(order[by_bin], np.cumsum(np.bincount(bin_of))[:-1])
        if random is None:
            return bins
        return [bins[number] for number in random.permutation(len(bins))]

    def balance_tokens(self, step: Numbers, count: int) -> list[Numbers]:
        """`count` parts of at most batch_size examples, with about the same number of tokens.

        The longest example first, each to the part that has the fewest tokens.
        """
        lengths = self.lengths[step]
        longest_first = np.argsort(-lengths, kind="stable")
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, part) for part in range(count)]  # a heap: the lightest part that has room
        for number, length in zip(
            step[longest_first].tolist(), lengths[longest_first].tolist(), strict=True
        ):
            load, part = heappop(loads)
            parts[part].append(number)
            if len(parts[part]) < self.batch_size:
                heappush(loads, (load + length, part))
        return [np.array(part, np.int64) for part in parts]


def dummy_of(number: int) -> int:
    """The number under which ExampleSet has example `number` as a dummy, and back."""
    return ~number


def in_groups(units: Numbers | list[Numbers], size: int) -> list[Any]:
    return [units[start : start + size] for start in range(0, len(units), size)]
