"""Texts that are nearly the same, among many, without comparing each with each.

MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, chapter 3): texts that share a band of their signatures are compared exactly.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Windows = NDArray[np.uint64]

ALIKE = 0.8  # of all windows of two texts, the share that both have
SHORTEST = 40  # characters; of shorter texts a word makes another text
WIDTH = 8  # bytes of a window
BANDS, ROWS = 16, 4  # a pair of 0.8 is found in 99.98 of 100 cases, one of 0.5 looked at in 64


def near_copies(texts: Sequence[str]) -> list[list[int]]:
    """Groups of numbers of texts that are nearly the same, at least two in each."""
    numbers = [number for number, text in enumerate(texts) if len(text) >= SHORTEST]
    windows = {number: windows_of(texts[number]) for number in numbers}
    first = {number: number for number in numbers}

    def root(number: int) -> int:
        while first[number] != number:
            number = first[number]
        return number

    for one, other in candidates(windows):
        a, b = sorted((root(one), root(other)))
        if a != b and likeness(windows[one], windows[other]) >= ALIKE:
            first[b] = a
    groups: dict[int, list[int]] = {}
    for number in numbers:
        groups.setdefault(root(number), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def windows_of(text: str) -> Windows:
    """The different runs of WIDTH bytes in the text."""
    content = np.frombuffer(text.encode(errors="replace"), np.uint8)
    runs = np.lib.stride_tricks.sliding_window_view(content, WIDTH)
    return np.unique(np.ascontiguousarray(runs).view(np.uint64))


def candidates(windows: dict[int, Windows]) -> Iterator[tuple[int, int]]:
    """Pairs of texts that share a band, the first of a band with each of the others."""
    random = np.random.default_rng(0)
    factors, shifts = random.integers(0, 2**63, (2, BANDS * ROWS), dtype=np.uint64)
    bands: dict[tuple[int, bytes], int] = {}
    for number, found in windows.items():
        hashes = (found[:, None] * (2 * factors + 1) + shifts) >> np.uint64(32)
        signature = hashes.min(axis=0).reshape(BANDS, ROWS)
        for band, values in enumerate(signature):
            first = bands.setdefault((band, values.tobytes()), number)
            if first != number:
                yield first, number


def likeness(one: Windows, other: Windows) -> float:
    """Jaccard's: windows of both, as a share of the windows of either."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
