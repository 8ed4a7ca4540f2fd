"""Which examples meet in a step, and how they lie in memory."""

import time
import tracemalloc

import numpy as np
import pytest

from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.bin_packing import pack_lengths
from finetuning.data.collator import Collator
from finetuning.data.example_set import ExampleSet
from finetuning.data.examples import Examples

RANDOM = np.random.default_rng(0)
LENGTHS = np.clip(RANDOM.lognormal(4.3, 0.9, 1003).astype(int), 2, 512)
ORDERS = [{}, {"by_length": True}, {"seed": None}]


def steps_of(processes: int, accumulation: int = 1, epoch: int = 0, **kwargs) -> list[set[int]]:
    """The set of examples of every step of a global batch of 16, over all processes."""
    settings = {"seed": 3, "batch_size": 16 // processes // accumulation, **kwargs}
    samplers = [
        BatchSampler(
            LENGTHS, processes=processes, process=process, accumulation=accumulation, **settings
        )
        for process in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    micro_batches = list(zip(*samplers, strict=True))
    assert all(len(sampler) == len(micro_batches) for sampler in samplers)
    steps = [
        micro_batches[start : start + accumulation]
        for start in range(0, len(micro_batches), accumulation)
    ]
    return [{n for parts in step for part in parts for n in part if n >= 0} for step in steps]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (4, 2), (16, 1)])
def test_steps_have_the_same_examples_however_many_processes_share_them(
    order, processes, accumulation
):
    assert steps_of(processes, accumulation, **order) == steps_of(1, **order)


@pytest.mark.parametrize("settings", [*ORDERS, {"tokens": 600}])
@pytest.mark.parametrize("is_padded", [True, False])
def test_slots_are_those_of_all_batches_of_an_epoch(settings, is_padded):
    settings = {"seed": 3, "batch_size": 4, "processes": 3, **settings}
    batches = [
        batch
        for process in range(3)
        for batch in BatchSampler(LENGTHS, process=process, **settings)
    ]
    lengths = [LENGTHS[batch] for batch in batches if batch[0] >= 0]
    slots = sum(batch.max() * len(batch) if is_padded else batch.sum() for batch in lengths)
    assert BatchSampler(LENGTHS, **settings).computed_tokens(is_padded) == slots


@pytest.mark.parametrize("settings", [*ORDERS, {"tokens": 600}, {"tokens": 600, "seed": None}])
@pytest.mark.parametrize("processes", [1, 3])
def test_an_epoch_has_every_example_once(settings, processes):
    settings = {"seed": 3, **settings}
    samplers = [
        BatchSampler(LENGTHS, 4, processes=processes, process=p, **settings)
        for p in range(processes)
    ]
    batches = [batch for sampler in samplers for batch in sampler]
    assert sorted(n for batch in batches for n in batch if n >= 0) == list(range(len(LENGTHS)))
    assert len({len(list(sampler)) for sampler in samplers}) == 1
    assert all(len(batch) == 1 for batch in batches if batch[0] < 0)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert steps_of(1) == steps_of(1)
    assert steps_of(1, seed=4) != steps_of(1)
    assert steps_of(1, epoch=1) != steps_of(1)
    assert steps_of(2, epoch=1) == steps_of(1, epoch=1)


def test_without_a_seed_the_examples_keep_their_order():
    assert steps_of(1, seed=None)[:2] == [set(range(16)), set(range(16, 32))]


def test_grouping_by_length_saves_padding_and_keeps_random_order():
    def padded(**settings) -> float:
        batches = list(BatchSampler(LENGTHS, 8, seed=3, **settings))
        return sum(LENGTHS[batch].max() * len(batch) for batch in batches) / LENGTHS.sum()

    assert padded(by_length=True) < 1.1 < 1.5 < padded()
    first = [LENGTHS[batch].mean() for batch in BatchSampler(LENGTHS, 8, seed=3, by_length=True)]
    assert first != sorted(first) and first != sorted(first, reverse=True)


def test_processes_get_about_as_many_tokens_each():
    parts = [
        list(BatchSampler(LENGTHS, 8, seed=3, processes=2, process=process)) for process in range(2)
    ]
    tokens = np.array([[LENGTHS[batch].sum() for batch in part] for part in parts])[:, :-1]
    assert (abs(tokens[0] - tokens[1]) / tokens.sum(0)).mean() < 0.1


@pytest.mark.parametrize("count", [1, 4, 16])
def test_the_longest_example_goes_first_to_the_part_that_has_the_fewest_tokens(count):
    step = np.random.default_rng(1).permutation(len(LENGTHS))[: 8 * count - 3]
    parts, loads = [[] for _ in range(count)], np.zeros(count)
    for number in sorted(step, key=lambda number: -LENGTHS[number]):
        lightest = min((load, part) for part, load in enumerate(loads) if len(parts[part]) < 8)[1]
        parts[lightest].append(number)
        loads[lightest] += LENGTHS[number]
    made = BatchSampler(LENGTHS, 8).balance_tokens(step, count)
    assert [part.tolist() for part in made] == parts


def test_the_largest_micro_batch_of_very_many_is_bounded_by_the_longest_examples():
    sampler = BatchSampler(LENGTHS, 8, seed=3, processes=2)
    exact = LENGTHS[sampler.longest(10**3, is_padded=False)].sum()
    started = time.perf_counter()
    bound = LENGTHS[sampler.longest(10**12, is_padded=False)]
    assert time.perf_counter() - started < 1
    assert sorted(bound) == sorted(LENGTHS)[-8:]
    assert bound.sum() >= exact


def test_the_largest_bin_of_any_epoch_is_one_of_the_first():
    sampler = BatchSampler(LENGTHS, 8, tokens=600, seed=3)
    largest = LENGTHS[sampler.longest(10**12, is_padded=False)].sum()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert max(LENGTHS[batch].sum() for batch in sampler) == largest


def test_the_order_of_two_million_examples_is_there_in_seconds():
    lengths = np.random.default_rng(0).choice(LENGTHS, 2 * 10**6)
    started = time.perf_counter()
    tracemalloc.start()
    sampler = BatchSampler(lengths, 8, seed=3)
    assert len(next(iter(sampler))) == 8
    sampler.longest(10**9, is_padded=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - started < 5  # 0.3 s of one core that has nothing else to do
    assert peak < 4 * lengths.nbytes


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_token_budget_is_kept_and_nearly_filled(epoch):
    sampler = BatchSampler(LENGTHS, 8, tokens=2048, seed=3)
    sampler.set_epoch(epoch)
    filled = [LENGTHS[batch].sum() for batch in sampler]
    assert max(filled) <= 2048
    assert sum(filled) / (2048 * len(filled)) > 0.98
    assert len(filled) == len(sampler)


def test_token_bins_differ_between_epochs():
    sampler = BatchSampler(LENGTHS, 8, tokens=2048, seed=3)
    first = {tuple(sorted(batch)) for batch in sampler}
    sampler.set_epoch(1)
    assert len(first & {tuple(sorted(batch)) for batch in sampler}) < len(first) / 2


@pytest.mark.parametrize("capacity", [64, 512, 1000])
def test_bins_hold_no_more_than_their_capacity_and_every_length_once(capacity):
    lengths = RANDOM.integers(1, capacity + 1, 5000)
    bins = pack_lengths(lengths, capacity)
    fill = np.bincount(bins, weights=lengths)
    assert fill.max() <= capacity and fill.min() > 0
    assert len(bins) == len(lengths)


def test_bins_are_as_few_as_best_fit_one_by_one_finds():
    lengths = np.clip(RANDOM.lognormal(3.5, 0.8, 800).astype(int), 1, 256)
    free: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [n for n, space in enumerate(free) if space >= length]
        if fits:
            free[min(fits, key=lambda n: free[n])] -= length
        else:
            free.append(256 - length)
    assert pack_lengths(lengths, 256).max() + 1 == len(free)


def test_a_million_lengths_are_packed_in_one_go():
    lengths = np.clip(RANDOM.lognormal(4.3, 0.9, 1_000_000).astype(int), 1, 2048)
    fill = np.bincount(pack_lengths(lengths, 2048), weights=lengths)
    assert fill.max() <= 2048
    assert fill.sum() / (len(fill) * 2048) > 0.999


def examples_of(*pairs: tuple[list[int], list[int]]) -> Examples:
    ids, labels = ([np.array(pair[which], np.int32) for pair in pairs] for which in (0, 1))
    lengths = np.array([len(one) for one in ids])
    return Examples(np.concatenate(ids), np.concatenate(labels), lengths, np.arange(len(ids)))


EXAMPLES = examples_of(([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5]))


def test_packed_examples_lie_in_one_row():
    batch = Collator("packed", 9)(list(EXAMPLES))
    assert batch["input_ids"].tolist() == [[1, 2, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 0]]
    assert batch["positions"].tolist() == [0, 1, 2] and batch["targets"].tolist() == [2, 3, 5]
    assert batch["lengths"] == [2, 1]


def test_padded_examples_lie_in_rows_of_one_length():
    batch = Collator("padded", 9)(list(EXAMPLES))
    assert batch["input_ids"].tolist() == [[1, 2], [4, 9]]
    assert batch["positions"].tolist() == [0, 1, 2] and batch["targets"].tolist() == [2, 3, 5]
    assert "position_ids" not in batch


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_tokens_that_no_target_depends_on_are_left_out(layout):
    first, nothing = ([1, 2, 3, 4], [-100, 2, -100, -100]), ([5, 6, 7], [-100] * 3)
    batch = Collator(layout, 9)(list(examples_of(first, nothing)))
    assert batch["input_ids"].flatten().tolist() == [1, 5] and batch["lengths"] == [1, 1]
    assert batch["positions"].tolist() == [0] and batch["targets"].tolist() == [2]


def test_an_example_is_found_by_its_number_without_a_copy():
    examples = ExampleSet(EXAMPLES)
    assert len(examples) == 2
    for found, expected in zip(examples, EXAMPLES, strict=True):
        assert {name: array.tolist() for name, array in found.items()} == {
            name: array.tolist() for name, array in expected.items()
        }
        assert all(np.shares_memory(found[name], getattr(EXAMPLES, name)) for name in found)


def test_a_set_of_examples_takes_no_memory_for_each_of_them():
    count = 100_000
    examples = examples_of(*[([1], [-100])] * count)
    tracemalloc.start()
    examples = ExampleSet(examples)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 10 * count and len(examples) == count  # 8 bytes, where it ends


def test_an_example_of_negative_number_trains_nothing():
    examples = ExampleSet(EXAMPLES)
    assert examples[~1]["input_ids"].tolist() == examples[1]["input_ids"].tolist() == [4, 5]
    assert set(examples[~1]["labels"].tolist()) == {-100}
