"""Bootstrap intervals: scipy's numbers, and what is called better."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from finetuning.evaluation import intervals
from finetuning.evaluation.intervals import RESAMPLES, SEED, mean_of, paired_difference


@pytest.mark.parametrize("count", [2, 7, 50, 1000])
def test_the_interval_is_scipys(count):
    values = np.random.default_rng(1).normal(30, 20, count)
    rng = np.random.default_rng(SEED)
    theirs = bootstrap([values], np.mean, method="percentile", n_resamples=RESAMPLES, rng=rng)
    ours = mean_of(values.tolist())
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low)
    assert ours.high == pytest.approx(theirs.confidence_interval.high)


def test_what_is_drawn_in_parts_is_what_is_drawn_at_once(monkeypatch):
    values = np.random.default_rng(2).normal(size=301).tolist()
    whole = mean_of(values)
    monkeypatch.setattr(intervals, "BATCH", 301 * 7)
    assert mean_of(values) == whole


def test_one_value_is_its_own_interval():
    assert mean_of([25.0]).record() == {"mean": 25.0, "low": 25.0, "high": 25.0}


def test_a_difference_is_taken_question_by_question():
    hard_and_easy = [10.0 * number for number in range(30)]
    better = [value + 1 for value in hard_and_easy]
    difference = paired_difference(better, hard_and_easy)
    assert difference.is_above_zero and not difference.is_below_zero
    assert mean_of(better).low < mean_of(hard_and_easy).high  # unpaired, nothing could be said
    other = paired_difference(hard_and_easy, hard_and_easy)
    assert not other.is_above_zero and not other.is_below_zero
