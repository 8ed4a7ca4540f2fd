"""The examples of a step, shared out to processes: the numbers multiply to what was asked for, or
are refused."""

import re

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from finetuning.budget.savings import remedies
from finetuning.errors import UserError
from finetuning.launch.step_size import StepSize, step_size
from finetuning.recipe.recipe import load_recipe
from finetuning.recipe.sections import Training

RECIPE = load_recipe(ROOT / "recipes" / "quickstart.yaml")


def shared_out(processes: int, **training) -> StepSize:
    return step_size(
        RECIPE.model_copy(update={"training": Training(output_dir="run", **training)}), processes
    )


@pytest.mark.parametrize(
    ("processes", "training", "expected"),
    [
        (1, {}, "1 x 1 x 8 = 8"),
        (4, {}, "4 x 1 x 8 = 32"),
        (2, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, "2 x 5 x 3 = 30"),
        (1, {"global_batch_size": 32}, "1 x 4 x 8 = 32"),
        (2, {"global_batch_size": 32}, "2 x 2 x 8 = 32"),
        (8, {"global_batch_size": 32}, "8 x 1 x 4 = 32"),
        (32, {"global_batch_size": 32}, "32 x 1 x 1 = 32"),
        (2, {"global_batch_size": 32, "per_device_train_batch_size": 4}, "2 x 4 x 4 = 32"),
        (16, {"global_batch_size": 32, "per_device_train_batch_size": 4}, "16 x 1 x 2 = 32"),
        (1, {"global_batch_size": 12}, "1 x 2 x 6 = 12"),
        (1, {"global_batch_size": 13}, "1 x 13 x 1 = 13"),
        (1, {"global_batch_size": 5}, "1 x 1 x 5 = 5"),
    ],
)
def test_a_step_is_processes_times_accumulation_times_micro_batch(processes, training, expected):
    assert str(shared_out(processes, **training)) == expected


@given(
    processes=st.integers(1, 64),
    total=st.none() | st.integers(1, 4096),
    micro_batch=st.none() | st.integers(1, 128),
    accumulation=st.integers(1, 64),
)
def test_the_examples_of_a_step_are_always_the_requested_ones(
    processes, total, micro_batch, accumulation
):
    training = {} if micro_batch is None else {"per_device_train_batch_size": micro_batch}
    training |= (
        {"gradient_accumulation_steps": accumulation}
        if total is None
        else {"global_batch_size": total}
    )
    try:
        step = shared_out(processes, **training)
    except UserError:
        at_once = min(micro_batch or 1, max(1, total // processes))
        assert total % (processes * at_once), "it would have divided"
        return
    assert step.processes == processes
    assert step.micro_batch * step.accumulation * step.processes == step.total
    assert step.total == (total or processes * (micro_batch or 8) * accumulation)
    share = step.total // processes
    assert micro_batch is None or step.micro_batch == min(micro_batch, share)
    if total and micro_batch is None:
        larger = range(step.micro_batch + 1, 9)
        assert step.micro_batch <= 8 and all(total // processes % size for size in larger)


@given(processes=st.integers(2, 64), total=st.integers(1, 4096))
def test_the_number_that_a_refusal_names_can_be_used(processes, total):
    try:
        shared_out(processes, global_batch_size=total)
    except UserError as error:
        near = int(re.search(r"use (\d+)", str(error))[1])
        assert shared_out(processes, global_batch_size=near).total == near
        assert abs(near - total) <= processes


@pytest.mark.parametrize(
    ("processes", "training", "said"),
    [
        (
            3,
            {"global_batch_size": 32},
            "training.global_batch_size: 32 examples cannot be shared out evenly to 3 processes; "
            "use 33, or a number "
            "of processes that divides 32",
        ),
        (
            8,
            {"global_batch_size": 3},
            "3 examples cannot be shared out evenly to 8 processes; use 8, ",
        ),
        (
            2,
            {"global_batch_size": 32, "per_device_train_batch_size": 5},
            "training.per_device_train_batch_size: 5 does not divide the 16 examples of a step "
            "that each of 2 "
            "processes has (training.global_batch_size 32); leave it out, or use a divisor",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(processes, training, said):
    with pytest.raises(UserError) as refused:
        shared_out(processes, **training)
    assert said in str(refused.value)


@given(
    processes=st.integers(1, 8),
    micro_batch=st.integers(2, 64),
    accumulation=st.integers(1, 8),
    is_global=st.booleans(),
)
def test_a_remedy_is_a_smaller_micro_batch_of_the_same_step(
    processes, micro_batch, accumulation, is_global
):
    total = processes * micro_batch * accumulation
    given = (
        {"global_batch_size": total} if is_global else {"gradient_accumulation_steps": accumulation}
    )
    training = Training(output_dir="run", per_device_train_batch_size=micro_batch, **given)
    recipe = RECIPE.model_copy(update={"training": training})
    advice = re.findall(r"training\.(\w+)=(\d+)", remedies(recipe, micro_batch, accumulation)[0])
    taken = shared_out(processes, **{**given, **{name: int(number) for name, number in advice}})
    assert taken.total == total and taken.micro_batch <= micro_batch / 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training.gradient_accumulation_steps=2",
            "follows from training.global_batch_size; leave one of them out",
        ),
        ("data.batch_tokens=512", "counts examples, data.batch_tokens tokens; leave one out"),
    ],
)
def test_what_says_the_size_of_a_step_a_second_time_is_refused(override, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_recipe(ROOT / "recipes" / "quickstart.yaml", [override])


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (StepSize(16, 1, 2), "2 processes x 1 micro-batch x 16 = 32 examples"),
        (StepSize(1, 4, 1), "1 process x 4 micro-batches x 1 = 4 examples"),
    ],
)
def test_a_step_is_described_by_its_parts(step, words):
    assert step.in_words() == words
