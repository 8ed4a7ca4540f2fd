"""Turns -> answers, with the prompt, the end tokens and the settings of the recipe.

A batch is answered alone, with its own seed, whichever process has it: the answers do not depend
on the number of processes, nor on being killed and started again.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from finetuning.errors import UserError
from finetuning.evaluation.turns import SEED, Key, Turn
from finetuning.inference.generation import Asker, batches_by_length

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    is_ended: bool
    """by an end token, not by generation.max_new_tokens"""


Answers = dict[Key, Answer]


@dataclass(frozen=True)
class Share:
    """Which of the batches a process answers."""

    process: int = 0
    processes: int = 1
    is_sharded: bool = False
    """each process holds a part of the weights, so all of them answer every batch"""

    def rounds(self, batches: list[list[T]]) -> Iterator[list[T]]:
        """This process's batch of each round; an empty one where there are fewer than processes."""
        if self.is_sharded:
            yield from batches
            return
        for first in range(0, len(batches), self.processes):
            mine = first + self.process
            yield batches[mine] if mine < len(batches) else []

    def together(self, answers: dict[K, T]) -> dict[K, T]:
        """Those of all processes, in every process."""
        if self.is_sharded or self.processes == 1:
            return answers
        return dict(gather_object(list(answers.items())))

    def of_first(self, value: T) -> T:
        """What the first process says, in every process."""
        said = [value]
        broadcast_object_list(said)  # in place
        return said[0]


@dataclass(frozen=True)
class Asked:
    """A turn's prompt for one model."""

    turn: Turn
    prompt: list[int]


def askable(asker: Asker, turns: Sequence[Turn]) -> list[Asked]:
    """The turns with their prompts, without those that are too long for the model."""
    asked = []
    for turn in turns:
        try:
            asked.append(Asked(turn, asker.prompt(turn.history, turn.tools)))
        except UserError:
            continue
    return asked


def ask(
    asker: Asker,
    turns: Sequence[Turn],
    share: Share = Share(),
    max_seconds: float = math.inf,
    known: Mapping[Key, Answer] = {},
    keep: Callable[[Answers], None] = lambda answers: None,
) -> Answers:
    """The answers to the turns, without those for which there was no time.

    `known` are not asked again where a whole batch of them is there; `keep` is told of each round
    of batches, in the first process.
    """
    asked = askable(asker, turns)
    batches = [[asked[n] for n in batch] for batch in batches_by_length([a.prompt for a in asked])]
    # In an order of chance: where time is out, the long ones are not what is missing.
    order = np.random.default_rng(SEED).permutation(len(batches))
    answers = {each.turn.key: known[each.turn.key] for each in asked if each.turn.key in known}
    left = [batch for batch in (batches[n] for n in order) if not is_known(batch, known)]
    began = time.monotonic()
    with tqdm(desc="answers", total=len(asked), disable=None, leave=False, delay=1) as bar:
        bar.update(len(asked) - sum(map(len, left)))
        for batch in share.rounds(left):
            if share.of_first(time.monotonic() - began > max_seconds):
                break
            found = share.together(answer_batch(asker, batch) if batch else {})
            answers |= found
            bar.update(len(found))
            if share.process == 0:
                keep(found)
    return answers


def is_known(batch: Sequence[Asked], known: Mapping[Key, Answer]) -> bool:
    return all(each.turn.key in known for each in batch)


def answer_batch(asker: Asker, batch: Sequence[Asked]) -> Answers:
    with asker.generating():
        responses = asker.respond([each.prompt for each in batch])
    ends = set(asker.ends())
    return {
        each.turn.key: Answer(asker.text(ids), not ends.isdisjoint(ids))
        for each, ids in zip(batch, responses, strict=True)
    }
