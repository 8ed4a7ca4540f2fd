"""Examples by number, as torch's DataLoader asks for them."""

import numpy as np
import torch

from finetuning.data.dummies import dummy_of
from finetuning.data.examples import IGNORE_INDEX, Example, Examples


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
