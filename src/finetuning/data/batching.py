"""Examples -> batches: which examples meet in a step, and how they lie in memory.

    padded   [[1, 2, 3, 0],        packed   [[1, 2, 3, 4, 5]]         no padding; `lengths` (3, 2) and
              [4, 5, 0, 0]]                  position_ids [[0, 1, 2, 0, 1]] tell the examples apart

A batch is a set of examples: the layout never changes the loss. Neither does the number of processes: they share out
the examples of one seeded order, the same for the same seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from finetuning.data.bin_packing import pack_lengths
from finetuning.data.tokenization import IGNORE_INDEX, Example, Examples

Batch = dict[str, Any]


WINDOW = 50  # steps whose examples are sorted together when grouping by length


@dataclass(frozen=True)
class Collator:
    """A list of examples -> what a model and the loss take.

    input_ids (1, T) packed or (B, T) padded; labels likewise; position_ids (1, T) packed only; positions (N,) of the N
    hidden states, flattened, that predict a trained token; targets (N,), those tokens; lengths, a number per example.
    No attention mask: packed examples are told apart by lengths, and causal attention never looks at padding on the
    right.
    """

    layout: str
    pad_token_id: int
    """fills padded rows; never attended to, never trained, so any id will do"""

    def __call__(self, examples: list[Example]) -> Batch:
        lengths = [len(example["input_ids"]) for example in examples]
        longest = max(lengths)
        if self.layout == "packed":
            input_ids = np.concatenate([example["input_ids"] for example in examples])[None]
            labels = np.concatenate([example["labels"] for example in examples])[None]
        else:
            input_ids = np.full((len(examples), longest), self.pad_token_id)
            labels = np.full((len(examples), longest), IGNORE_INDEX)
            for number, example in enumerate(examples):
                input_ids[number, : lengths[number]] = example["input_ids"]
                labels[number, : lengths[number]] = example["labels"]
        # An example's first token is never trained, so the position before a target is of the same example.
        predicted = np.flatnonzero(labels.reshape(-1) != IGNORE_INDEX)
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "positions": predicted - 1,
            "targets": labels.reshape(-1)[predicted],
        }
        if self.layout == "packed":
            batch["position_ids"] = np.concatenate([np.arange(length) for length in lengths])[None]
        return {
            **{name: torch.as_tensor(array.astype(np.int64)) for name, array in batch.items()},
            "lengths": lengths,
        }


class ExampleSet(torch.utils.data.Dataset):
    """Examples by number. Of number ~n (negative) comes example n with nothing to train.

    Such an example keeps a process busy that has no other in the last batch of an epoch.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.ends = (
            examples.ends
        )  # added up once; a list of all examples instead is 0.4 s and 84 MiB for 200,000

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        at = ~number if number < 0 else number
        tokens = slice(self.ends[at] - self.examples.lengths[at], self.ends[at])
        labels = self.examples.labels[tokens]
        return {
            "input_ids": self.examples.input_ids[tokens],
            "labels": np.full_like(labels, IGNORE_INDEX) if number < 0 else labels,
        }


@dataclass
class BatchSampler:
    """The numbers of the examples of every micro-batch of one process, epoch by epoch.

    A step takes batch_size * processes * accumulation examples; or, with `tokens`, as many as fill that many bins of
    so many tokens. They are dealt out so that every process has about the same number of tokens.
    """

    lengths: np.ndarray  # (examples,)
    batch_size: int
    """examples of a micro-batch"""
    tokens: int | None = None
    """tokens of a micro-batch at most, instead of batch_size"""
    processes: int = 1
    process: int = 0
    accumulation: int = 1
    """micro-batches of a step"""
    seed: int | None = None
    """of the order; None keeps the examples' own"""
    by_length: bool = False
    """examples of like length meet in a step; the steps come in random order all the same"""
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def longest(self, micro_batches: int, is_padded: bool) -> list[int]:
        """The examples of the largest micro-batch that any process gets among its first so many, in all epochs."""
        largest, found = (0, 0), [0]
        for epoch in range(-(-micro_batches // len(self))):
            steps = replace(self, epoch=epoch).steps()
            dealt = (parts for step in steps for parts in self.micro_batches_of(step))
            for part in chain.from_iterable(islice(dealt, micro_batches - epoch * len(self))):
                lengths = self.lengths[part]
                longest = int(lengths.max(initial=0))
                size = (longest * len(part) if is_padded else int(lengths.sum()), longest)
                if size > largest:
                    largest, found = size, part.tolist()
        return found

    def computed_tokens(self, is_padded: bool) -> int:
        """Tokens that are computed in an epoch, padding too, by all processes."""
        if not is_padded:
            return int(self.lengths.sum())
        parts = (
            self.lengths[part]
            for step in self.steps()
            for dealt in self.micro_batches_of(step)
            for part in dealt
        )
        return sum(int(lengths.max(initial=0)) * len(lengths) for lengths in parts)

    def __len__(self) -> int:
        """Micro-batches of an epoch, the same for every process and epoch."""
        if self.tokens:
            return -(-int(pack_lengths(self.lengths, self.tokens).max() + 1) // self.processes)
        return -(-len(self.lengths) // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            for parts in self.micro_batches_of(step):
                part = parts[self.process]
                # A process without an example computes one that trains nothing.
                yield part.tolist() if len(part) else [~int(parts[0][0])]

    def steps(self) -> Iterator[list[np.ndarray]]:
        """For each step the numbers of its examples, in bins if it is tokens that are counted."""
        random = np.random.default_rng((self.seed, self.epoch)) if self.seed is not None else None
        if self.tokens:
            units = self.bins(random)
            size = self.processes * self.accumulation
        else:
            units = self.order(random)
            size = self.batch_size * self.processes * self.accumulation
        groups = [units[start : start + size] for start in range(0, len(units), size)]
        if self.by_length and random is not None:
            # The last one stays: it may be smaller, and accumulation counts on whole steps before it.
            groups = [groups[number] for number in random.permutation(len(groups) - 1)] + groups[
                -1:
            ]
        yield from groups

    def order(self, random: np.random.Generator | None) -> np.ndarray:
        if random is None:
            return np.arange(len(self.lengths))
        order = random.permutation(len(self.lengths))
        if self.by_length:
            window = WINDOW * self.batch_size * self.processes * self.accumulation
            for start in range(0, len(order), window):
                part = order[start : start + window]
                order[start : start + window] = part[np.argsort(-self.lengths[part], kind="stable")]
        return order

    def bins(self, random: np.random.Generator | None) -> list[np.ndarray]:
        """The examples in bins of at most `tokens`, in random order; examples of one length change places."""
        order = self.order(random) if random is None else random.permutation(len(self.lengths))
        bin_of = pack_lengths(self.lengths[order], self.tokens)
        by_bin = np.argsort(bin_of, kind="stable")
        bins = np.split(order[by_bin], np.cumsum(np.bincount(bin_of))[:-1])
        return (
            bins if random is None else [bins[number] for number in random.permutation(len(bins))]
        )

    def micro_batches_of(self, step: Any) -> Iterator[list[np.ndarray]]:
        """The step's examples as micro-batches, each a list of one part for every process."""
        if self.tokens:
            parts = [*step, *([np.empty(0, np.int64)] * (-len(step) % self.processes))]
        else:
            count = -(-len(step) // (self.batch_size * self.processes)) * self.processes
            parts = self.balance_tokens(step, count)
        for start in range(0, len(parts), self.processes):
            yield parts[start : start + self.processes]

    def balance_tokens(self, step: np.ndarray, count: int) -> list[np.ndarray]:
        """`count` parts of at most batch_size examples: the longest first, each to the part with the fewest tokens."""
        parts: list[list[int]] = [[] for _ in range(count)]
        load = np.zeros(count)
        for number in step[np.argsort(-self.lengths[step], kind="stable")].tolist():
            lightest = int(load.argmin())
            parts[lightest].append(number)
            load[lightest] += self.lengths[number]
            if len(parts[lightest]) == self.batch_size:
                load[lightest] = np.inf
        return [np.array(part, np.int64) for part in parts]
