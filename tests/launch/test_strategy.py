"""What the launcher was asked for is read from its environment, and a run that got something else
is refused."""

import json
import os
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from conftest import ROOT

from finetuning.errors import UserError
from finetuning.launch.strategy import (
    Strategy,
    actual_strategy,
    launch_environment,
    launch_of,
    requested_strategy,
    require_strategy,
)

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Strategy("single", 1)),
        ({"WORLD_SIZE": "1"}, Strategy("single", 1)),
        ({"WORLD_SIZE": "4"}, Strategy("ddp", 4)),
        (
            {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"},
            Strategy("single", 1),
        ),
        (FSDP, Strategy("fsdp", 2)),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "false"}, Strategy("fsdp", 2)),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, Strategy("fsdp", 2, offload=True)),
        (ZERO, Strategy("zero2", 2)),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, Strategy("zero1", 2)),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "WORLD_SIZE": "1"}, Strategy("zero3", 1)),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}, Strategy("zero2", 2)),
        (
            {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            Strategy("zero2", 2, offload=True),
        ),
        (
            {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            Strategy("zero2", 2, offload=True),
        ),
    ],
)
def test_the_environment_names_the_requested_strategy(launched, environment, expected):
    launched(environment)
    assert requested_strategy() == expected


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, Strategy("zero0", 2)),
        ({"stage": 1}, Strategy("zero1", 2)),
        ({"stage": 3, "offload_param": None}, Strategy("zero3", 2)),
        (
            {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {}},
            Strategy("zero3", 2),
        ),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, Strategy("zero2", 2, offload=True)),
    ],
)
def test_a_file_of_deepspeed_wins_over_the_fields_of_accelerate(launched, tmp_path, zero, expected):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    fields = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    }
    launched({**ZERO, **fields, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert requested_strategy() == expected


@pytest.mark.parametrize(
    "content",
    ["", '{"zero_optimization": {"stage": 2}', "\0", "{}", "[]", '{"zero_optimization": 3}', None],
    ids=["empty", "cut off", "not text", "nothing in it", "a list", "a number", "missing"],
)
def test_a_damaged_file_of_deepspeed_is_named_in_one_line(launched, tmp_path, content):
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(content)
    launched({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    with pytest.raises(UserError, match="is no DeepSpeed config with zero_optimization") as refused:
        requested_strategy()
    assert str(refused.value).startswith(f"{file}: ") and "\n" not in str(refused.value)


def test_a_config_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"^nowhere\.yaml: is no accelerate config"):
        launch_environment("nowhere.yaml", None)


@pytest.mark.parametrize("content", ["", "[]", "a: [", "num_processes: 2", "distributed_type: ALL"])
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="is no accelerate config: ") as refused:
        launch_environment(str(tmp_path / "config.yaml"), None)
    assert "\n" not in str(refused.value)


def test_a_config_that_leaves_open_how_many_needs_the_flag(launched):
    file = str(ROOT / "accelerate_configs/zero3.yaml")
    with pytest.raises(
        UserError, match=r"zero3\.yaml: does not say how many processes; add --num_processes"
    ):
        launch_environment(file, None)
    launched(launch_environment(file, "8"))
    assert requested_strategy() == Strategy("zero3", 8)


def test_a_config_whose_number_is_null_needs_the_flag_too(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: null\n")
    with pytest.raises(UserError, match="does not say how many processes"):
        launch_environment(str(file), None)


def test_a_config_that_hides_the_gpus_hides_them_from_preview_too():
    hidden = launch_environment(str(ROOT / "accelerate_configs/cpu_ddp.yaml"), None)[
        "CUDA_VISIBLE_DEVICES"
    ]
    assert hidden.split(",")[0] == "-1"
    assert "CUDA_VISIBLE_DEVICES" not in launch_environment(
        str(ROOT / "accelerate_configs/ddp.yaml"), "2"
    )


def test_a_file_of_deepspeed_that_a_config_names_is_read(launched, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "zero.json")},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    launched(launch_environment(str(tmp_path / "config.json"), "4"))
    assert requested_strategy() == Strategy("zero1", 4)


def test_a_strategy_reads_like_a_sentence():
    assert str(Strategy("single", 1)) == "single, 1 process"
    assert str(Strategy("zero3", 8, offload=True)) == "zero3 with offload, 8 processes"
    sharded = {
        name
        for name in ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
        if Strategy(name, 2).is_sharded
    }
    assert sharded == {"fsdp", "zero3"}


# What runs


def prepared(kind: str, processes: int, mixed: str = "no", offload: bool = False, **args):
    """What a prepared trainer says of itself, as far as it is asked."""
    stage = int(kind.removeprefix("zero")) if kind.startswith("zero") else 0
    engine = SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        config={
            "zero_optimization": {
                "stage": stage,
                "offload_param": {"device": "cpu"} if offload else None,
            }
        },
    )
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            distributed_type=SimpleNamespace(value="DEEPSPEED" if stage else kind),
            num_processes=processes,
            state=SimpleNamespace(
                mixed_precision=mixed,
                fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=offload),
            ),
        ),
        model_wrapped=engine,
        args=SimpleNamespace(**{"bf16": False, "fp16": False, "device": "cpu", **args}),
    )


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        (prepared("NO", 1), Strategy("single", 1)),
        (prepared("MULTI_CPU", 2), Strategy("ddp", 2)),
        (prepared("MULTI_GPU", 1), Strategy("single", 1)),
        (prepared("FSDP", 2), Strategy("fsdp", 2)),
        (prepared("FSDP", 2, offload=True), Strategy("fsdp", 2, offload=True)),
        (prepared("zero1", 2), Strategy("zero1", 2)),
        (prepared("zero3", 4, offload=True), Strategy("zero3", 4, offload=True)),
    ],
)
def test_the_requested_strategy_is_the_actual_one(trainer, expected):
    assert actual_strategy(trainer) == expected
    require_strategy(trainer, expected)


@pytest.mark.parametrize(
    ("wanted", "trainer", "found"),
    [
        (Strategy("fsdp", 2), prepared("MULTI_CPU", 2), "ddp, 2 processes"),
        (Strategy("zero3", 2), prepared("MULTI_CPU", 2), "ddp, 2 processes"),
        (Strategy("ddp", 2), prepared("NO", 1), "single, 1 process"),
        (Strategy("zero3", 2), prepared("zero2", 2), "zero2, 2 processes"),
        (Strategy("zero3", 2, offload=True), prepared("zero3", 2), "zero3, 2 processes"),
        (Strategy("single", 1), prepared("MULTI_CPU", 2), "ddp, 2 processes"),
    ],
)
def test_a_run_that_is_something_else_is_refused(wanted, trainer, found):
    with pytest.raises(UserError) as refused:
        require_strategy(trainer, wanted)
    assert f"asked for {wanted}, but what runs is {found}; " in str(refused.value)


@pytest.mark.parametrize(
    ("mixed", "recipe"),
    [("bf16", {}), ("fp16", {"bf16": True}), ("no", {"fp16": True}), ("fp8", {"bf16": True})],
)
def test_a_precision_that_is_not_the_recipe_s_is_refused(mixed, recipe):
    with pytest.raises(
        UserError, match=f"mixed_precision is {mixed}, the recipe's {next(iter(recipe), 'no')}; "
    ):
        require_strategy(prepared("NO", 1, mixed, **recipe), Strategy("single", 1))


@pytest.mark.parametrize(
    ("mixed", "recipe", "said"),
    [("no", {}, "fp32"), ("bf16", {"bf16": True}, "bf16"), ("fp16", {"fp16": True}, "fp16")],
)
def test_the_precision_of_the_recipe_is_taken_and_written_down(mixed, recipe, said):
    trainer = prepared("MULTI_CPU", 2, mixed, **recipe)
    require_strategy(trainer, Strategy("ddp", 2))
    launch = launch_of(trainer, Strategy("ddp", 2))
    assert (launch["strategy"], launch["processes"], launch["precision"]) == ("ddp", 2, said)
    assert launch["process"] == os.getpid()


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_a_config_that_starts_one_process_is_refused_where_two_are_asked_for(tmp_path, kind):
    file = tmp_path / "one.yaml"
    file.write_text(f"distributed_type: '{kind}'\nnum_processes: 1\n")
    assert launch_environment(str(file), None)["WORLD_SIZE"] == "1"
    with pytest.raises(UserError, match=f"one.yaml: distributed_type: {kind} starts one process"):
        launch_environment(str(file), "2")


def test_a_bare_no_which_yaml_reads_as_false_is_refused_in_one_line(tmp_path):
    (tmp_path / "one.yaml").write_text("distributed_type: NO\nnum_processes: 1\n")
    with pytest.raises(UserError, match="write 'NO' in quotes"):
        launch_environment(str(tmp_path / "one.yaml"), None)


def test_a_process_that_was_started_alone_of_two_is_told_before_anything_is_read(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("finetuning.launch.strategy.requested_processes", lambda: 2)
    with pytest.raises(UserError, match="accelerate started one process where 2 were asked for"):
        requested_strategy()
