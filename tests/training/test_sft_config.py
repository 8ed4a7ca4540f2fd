"""The training section as SFTConfig: where it trains, and in which number format, on machines with
GPUs and without.
"""

import json

import pytest
import torch
from conftest import ROOT

from finetuning.launch.devices import local_device
from finetuning.recipe.recipe import load_recipe
from finetuning.recipe.schema import recipe_schema
from finetuning.training.sft_config import make_arguments


@pytest.fixture
def two_t4(monkeypatch):
    """Two GPUs without bfloat16, as far as settings are made for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def arguments_of(tmp_path, *overrides: str):
    recipe = load_recipe(
        ROOT / "recipes/quickstart.yaml", [f"training.output_dir={tmp_path}", *overrides]
    )
    return make_arguments(recipe, has_eval=True)


def test_one_process_trains_on_one_gpu_however_many_it_sees(tmp_path, launched, two_t4):
    launched({"ACCELERATE_USE_CPU": "False"})
    args = arguments_of(tmp_path)
    assert (args.device.type, args.n_gpu, args.train_batch_size) == (
        "cuda",
        1,
        args.per_device_train_batch_size,
    )
    assert (args.bf16, args.fp16, args.dataloader_pin_memory) == (False, True, True)


@pytest.mark.parametrize(
    ("environment", "overrides"),
    [
        ({"ACCELERATE_USE_CPU": "True"}, []),  # what cpu.yaml comes to
        ({"ACCELERATE_USE_CPU": "True"}, ["training.use_cpu=false"]),
        ({}, ["training.use_cpu=true"]),
    ],
)
def test_gpus_are_left_alone_where_launcher_or_recipe_say_so(
    tmp_path, launched, two_t4, environment, overrides
):
    launched(environment)
    args = arguments_of(tmp_path, *overrides)
    assert (args.device.type, args.n_gpu) == ("cpu", 0)
    assert (args.bf16, args.fp16, args.dataloader_pin_memory) == (False, False, False)


def test_without_a_gpu_the_cpu_is_used_and_said_to_be(tmp_path, launched):
    launched({})
    args = arguments_of(tmp_path)
    assert (args.device.type, args.use_cpu, args.bf16, args.fp16) == ("cpu", True, False, False)


def test_the_budget_is_that_of_the_cpu_where_the_recipe_stays_on_it(two_t4):
    assert not local_device(
        load_recipe(ROOT / "recipes/quickstart.yaml", ["training.use_cpu=true"])
    ).is_gpu


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (16, False)),
        (["per_device_train_batch_size=4"], (4, False)),
        (["per_device_eval_batch_size=null"], (16, False)),
        (["per_device_eval_batch_size=3", "logging_nan_inf_filter=true"], (3, True)),
    ],
)
def test_what_the_schema_tells_an_editor_is_what_a_run_has(tmp_path, launched, overrides, expected):
    launched({})
    args = arguments_of(tmp_path, *[f"training.{override}" for override in overrides])
    assert (args.per_device_eval_batch_size, args.logging_nan_inf_filter) == expected
    schema = json.loads(recipe_schema())["$defs"]["Training"]["properties"]
    assert schema["per_device_eval_batch_size"]["default"] is None  # as in training
    assert schema["logging_nan_inf_filter"]["default"] is False


@pytest.mark.parametrize(
    ("overrides", "expected"), [([], False), (["null"], False), (["true"], True)]
)
def test_activations_are_computed_twice_only_where_the_recipe_says_so(
    tmp_path, launched, overrides, expected
):
    launched({})
    args = arguments_of(
        tmp_path, *[f"training.activation_checkpointing={value}" for value in overrides]
    )
    assert args.activation_checkpointing is args.gradient_checkpointing is expected
