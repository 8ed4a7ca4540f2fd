"""Which examples meet in a step, and which of them each process gets.

The number of processes changes no step: they divide the examples of one seeded order among them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetuning.data.bin_packing import ceil_div, pack_lengths
from finetuning.data.dummies import dummy_of

Numbers = NDArray[np.int64]  # (n,) numbers of examples

SEARCHED = 2**21  # examples, about three seconds' worth, among which the largest batch is sought
WINDOW = 50  # steps whose examples are sorted together when grouping by length


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


def in_groups(units: Numbers | list[Numbers], size: int) -> list[Any]:
    return [units[start : start + size] for start in range(0, len(units), size)]
