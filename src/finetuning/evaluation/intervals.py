"""Means with 95 % bootstrap intervals, and the difference of two models on the same questions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0
BATCH = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Mean:
    """A mean, and the interval in which it lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high < 0

    def record(self) -> dict[str, float]:
        return asdict(self)


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of (n,) values with its percentile bootstrap interval.

    The numbers of scipy.stats.bootstrap (method="percentile", rng=SEED), which is 140 MB.
    """
    sample = np.asarray(values, float)
    rng = np.random.default_rng(SEED)
    rows = max(1, BATCH // len(sample))
    means: list[float] = []
    while len(means) < RESAMPLES:
        count = min(rows, RESAMPLES - len(means))
        drawn = rng.integers(0, len(sample), (count, len(sample)))
        means += sample[drawn].mean(axis=1).tolist()
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Mean(float(sample.mean()), float(low), float(high))


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Mean:
    """How much more `values` has than `others`, question by question."""
    return mean_of([value - other for value, other in zip(values, others, strict=True)])
