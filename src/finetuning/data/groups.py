"""Rows that say the same: copies, and rows that must not be on both sides of the evaluation split.

What a row says is kept as 64-bit keys; 0 is no key, which nothing else has in common.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetuning.data.examples import Counts
from finetuning.data.row import Message

Keys = NDArray[np.uint64]

# Characters from which a response that stands in two rows is the same answer. A shorter one, such
# as `Yes` or a label, is an answer to many questions.
SAME_ANSWER = 40


def prompt_key(messages: Sequence[Message]) -> int:
    """Of what is asked before the first response; a system message asks nothing."""
    before = takewhile(lambda turn: turn["role"] != "assistant", messages)
    return text_key(*(turn["content"] for turn in before if turn["role"] != "system"))


def response_key(messages: Sequence[Message]) -> int:
    """Of all responses."""
    texts = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    return text_key(*texts) if sum(map(len, texts)) >= SAME_ANSWER else 0


def text_key(*texts: str) -> int:
    """Of the texts, whatever their case and white space."""
    words = [" ".join(text.split()).casefold() for text in texts]
    return key_of("\n".join(words).encode()) if any(words) else 0


def value_key(value: Any) -> int:
    """Of the value of a column."""
    if value is None:
        return 0
    return key_of(json.dumps(value, sort_keys=True, default=str).encode())


def key_of(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def first_of_group(keys: Iterable[Keys]) -> Counts:
    """(n,) for each of n rows the number of the first row that it has a key in common with.

    Groups that share a row are one group. The arrays of keys are used one after the other: of five
    million rows each has 40 MB, and what is sorted of it four times that.
    """
    members, groups = zip(*map(members_and_groups, keys), strict=True)
    first = np.arange(len(groups[0]), dtype=np.int32)
    while True:
        before = first.copy()
        for numbers, group in zip(members, groups, strict=True):
            least = np.full(group.max(initial=-1) + 1, len(first), np.int32)
            np.minimum.at(least, group[numbers], first[numbers])
            first[numbers] = least[group[numbers]]
        if np.array_equal(first, before):
            return first.astype(np.int64)


def members_and_groups(keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """(n,) whether a row has a key, and (n,) the number of the rows that have the same."""
    return keys != 0, np.unique(keys, return_inverse=True)[1].astype(np.int32)
