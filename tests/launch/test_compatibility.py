"""What does not go together is refused before torch is imported, and `python -m` prints the
rules."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import assert_one_line
from conftest import ROOT

import sft
from finetuning.errors import UserError
from finetuning.launch import compatibility, devices
from finetuning.launch.compatibility import RULES, require_compatible, table
from finetuning.launch.strategy import Strategy, launch_environment, requested_strategy
from finetuning.recipe.recipe import load_recipe

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}
GATHERS = {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
ZERO_3 = {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}


def file_of(zero: dict, **settings) -> dict[str, str]:
    """The environment of a DeepSpeed file; the test writes its content and names it."""
    return {
        **ZERO,
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": json.dumps({"zero_optimization": zero, **settings}),
    }


# (what a rule says, overrides of the quickstart, environment)
CASES = [
    ("ZeRO with ACCELERATE_USE_CPU=true", [], {**ZERO, "ACCELERATE_USE_CPU": "true"}),
    ("ZeRO stage 0", [], {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}),
    ("ZeRO stage 0", [], file_of({"stage": 0})),
    ("ZeRO-3 that does not gather weights on saving", [], ZERO_3),
    (
        "ZeRO-3 that does not gather weights on saving",
        [],
        {**ZERO_3, "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"},
    ),
    ("ZeRO-3 that does not gather weights on saving", [], {**GATHERS, **file_of({"stage": 3})}),
    (
        "ZeRO with an optimizer or scheduler in DeepSpeed's file",
        [],
        file_of({"stage": 2}, optimizer={"type": "AdamW"}),
    ),
    (
        "ZeRO with an optimizer or scheduler in DeepSpeed's file",
        [],
        file_of({"stage": 1}, scheduler={"type": "WarmupLR"}),
    ),
    (
        "ZeRO offload without a C++ compiler",
        [],
        {
            **ZERO_3,
            **GATHERS,
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
            "PATH": "/nowhere",
        },
    ),
    (
        "ZeRO offload without a C++ compiler",
        [],
        {**file_of({"stage": 2, "offload_optimizer": {"device": "cpu"}}), "PATH": "/nowhere"},
    ),
    (
        "model.quantization with ZeRO-3 or FSDP",
        ["model.from_scratch=null", "model.name=a", "model.quantization=8bit", "lora={r: 4}"],
        {**ZERO_3, **GATHERS},
    ),
    (
        "training.auto_find_batch_size with ZeRO or FSDP",
        ["training.auto_find_batch_size=true"],
        ZERO,
    ),
    (
        "training.loraplus_lr_ratio with ZeRO or FSDP",
        ["lora={r: 4}", "training.loraplus_lr_ratio=16"],
        ZERO,
    ),
    ("model.dtype: float16 with training", ["model.dtype=float16"], {}),
    (
        "model.dtype: bfloat16 with training.fp16",
        ["model.dtype=bfloat16", "training.fp16=true"],
        {},
    ),
    (
        "training.load_best_model_at_end without data.eval",
        ["training.load_best_model_at_end=true", "data.eval=null", "training.eval_strategy=no"],
        {},
    ),
    (
        "training.load_best_model_at_end with fewer saves than evaluations",
        ["training.load_best_model_at_end=true", "training.save_steps=340"],
        {},
    ),
    ("training.bf16 with training.fp16", ["training.bf16=true", "training.fp16=true"], {}),
    (
        "training.activation_checkpointing_kwargs without training.activation_checkpointing",
        ["training.activation_checkpointing_kwargs={use_reentrant: true}"],
        {},
    ),
    ("training.torch_compile", ["training.torch_compile=true"], {}),
    *(
        (
            "training.bf16_full_eval or training.fp16_full_eval",
            [f"training.{name}_full_eval=true"],
            {},
        )
        for name in ("bf16", "fp16")
    ),
    ("training.debug: underflow_overflow", ["training.debug=underflow_overflow"], {}),
]
# (what a rule says, whether there is a GPU, environment, overrides): only torch can tell, so it is
# imported first.
GPU_CONFIG = "an accelerate config for GPUs without a usable GPU"
VISIBLE = {"CUDA_VISIBLE_DEVICES": "0"}  # tests on a machine without GPUs hide them all
OFFLOADING = ["training.activation_offloading=true"]
MACHINE_CASES = [
    ("FSDP on a CPU", False, FSDP, []),
    ("FSDP on a CPU", False, {**FSDP, "FSDP_VERSION": "2"}, []),
    ("FSDP version 1", True, FSDP, []),
    (GPU_CONFIG, False, {"WORLD_SIZE": "2", **VISIBLE}, []),
    (GPU_CONFIG, False, {**ZERO, **VISIBLE}, []),
    ("training.activation_offloading on a CPU", False, {}, OFFLOADING),
    (
        "training.activation_offloading on a CPU",
        True,
        {},
        [*OFFLOADING, "training.use_cpu=true"],
    ),
]

WORKS = [
    ([], {}),
    ([], {"WORLD_SIZE": "2"}),
    ([], ZERO),
    ([], {**ZERO_3, **GATHERS}),
    ([], file_of({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True})),
    ([], {"ACCELERATE_USE_CPU": "true"}),
    ([], {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "left over from another run"}),
    (["model.dtype=bfloat16"], {}),
    (["training.fp16=true"], {}),
    (
        [
            "training.activation_checkpointing=true",
            "training.activation_checkpointing_kwargs={use_reentrant: true}",
        ],
        {},
    ),
    (["model.dtype=float16", "lora={r: 4}"], {}),
    (["training.auto_find_batch_size=true"], {"WORLD_SIZE": "2"}),
    (["training.load_best_model_at_end=true"], {}),
    (
        [
            "training.load_best_model_at_end=true",
            "training.save_strategy=best",
            "training.save_steps=1",
        ],
        {},
    ),
    (["data.eval=null", "training.eval_strategy=no"], {}),
]


def on_disk(environment: dict[str, str], folder) -> dict[str, str]:
    """The same environment, with the content of a DeepSpeed file written to one."""
    content = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if not content.startswith("{"):
        return environment
    (folder / "zero.json").write_text(content)
    return {**environment, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "zero.json")}


def refusal(what: str) -> str:
    (rule,) = [rule for rule in RULES if rule.what == what]
    return f"{what} does not work: {rule.why}; instead: {rule.instead}"


def test_every_rule_has_a_case():
    assert {case[0] for case in (*CASES, *MACHINE_CASES)} == {rule.what for rule in RULES}


def folder_with_deepspeed(folder: Path) -> str:
    """Where DeepSpeed seems to be installed: without it nothing else of a config is looked at."""
    (folder / "site").mkdir()
    (folder / "site" / "deepspeed.py").touch()
    return str(folder / "site")


@pytest.mark.parametrize(("what", "overrides", "environment"), CASES)
def test_what_does_not_go_together_is_refused_before_torch_is_imported(
    what,
    overrides,
    environment,
    run_fork,
    tmp_path,
):
    arguments = [QUICKSTART, f"training.output_dir={tmp_path / 'run'}", *overrides]
    site = folder_with_deepspeed(tmp_path)
    refused = run_fork("sft.py", *arguments, **on_disk(environment, tmp_path), PYTHONPATH=site)
    assert_one_line(refused, [refusal(what)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("what", "gpu", "environment", "overrides"), MACHINE_CASES)
def test_what_only_the_machine_can_tell_is_refused_before_a_model_is_loaded(
    what, gpu, environment, overrides, launched, monkeypatch, tmp_path
):
    launched(on_disk(environment, tmp_path))
    monkeypatch.syspath_prepend(folder_with_deepspeed(tmp_path))
    monkeypatch.setattr(compatibility, "has_gpu", lambda: gpu)
    with pytest.raises(UserError) as refused:
        sft.main([QUICKSTART, f"training.output_dir={tmp_path / 'run'}", *overrides])
    assert str(refused.value) == refusal(what)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("what", "config", "overrides"),
    [
        (
            "training.torch_compile",
            {"distributed_type": "MULTI_GPU"},
            ["training.torch_compile=true"],
        ),
        (
            "training.auto_find_batch_size with ZeRO or FSDP",
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero3_save_16bit_model": True}},
            ["training.auto_find_batch_size=true"],
        ),
        (
            "ZeRO-3 that does not gather weights on saving",
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
            [],
        ),
        (
            "FSDP version 1",
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": False}},
            [],
        ),
    ],
)
def test_preview_refuses_what_training_would_refuse(what, config, overrides, run_warm, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--config_file", tmp_path / "config.json", "--num_processes", "4", "--gpu", "t4"]
    refused = run_warm(
        "preview.py", QUICKSTART, f"training.output_dir={tmp_path / 'run'}", *overrides, *flags
    )
    assert_one_line(refused, [refusal(what)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", ["zero3", "zero2", "fsdp2", "ddp", "zero3_offload"])
def test_preview_takes_every_config_for_gpus_on_a_machine_without(config, launched):
    launched(launch_environment(str(ROOT / f"accelerate_configs/{config}.yaml"), "4"))
    require_compatible(load_recipe(QUICKSTART), requested_strategy(), trains_here=False)


@pytest.mark.parametrize(("overrides", "environment"), WORKS)
def test_what_goes_together_is_not_refused(overrides, environment, launched, tmp_path):
    launched(on_disk(environment, tmp_path))
    require_compatible(load_recipe(QUICKSTART, overrides), requested_strategy())


def test_fsdp_2_on_gpus_is_not_refused(launched, monkeypatch):
    launched({**FSDP, "FSDP_VERSION": "2"})
    monkeypatch.setattr(compatibility, "has_gpu", lambda: True)
    require_compatible(load_recipe(QUICKSTART), requested_strategy())


def test_offload_with_a_compiler_is_not_refused(launched, monkeypatch, tmp_path):
    (tmp_path / "g++").touch(mode=0o755)
    launched(
        {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "PATH": str(tmp_path)}
    )
    assert requested_strategy() == Strategy("zero2", 2, offload=True)
    require_compatible(load_recipe(QUICKSTART), requested_strategy())


# The table


def test_the_table_has_a_row_for_each_rule():
    head, line, *rows = table().splitlines()
    assert head.count("|") == line.count("|") == 4
    assert [row.strip("| ").split(" | ") for row in rows] == [
        [rule.what, rule.why, rule.instead] for rule in RULES
    ]


def test_the_module_prints_the_table():
    command = [sys.executable, "-m", "finetuning.launch.compatibility"]
    done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{table()}\n", done.stderr


def test_what_a_rule_tells_to_use_is_there():
    named = {path for rule in RULES for path in re.findall(r"[\w/]+\.yaml", rule.instead)}
    assert named and all(
        list(ROOT.glob(path)) or list(ROOT.glob(f"accelerate_configs/{path}")) for path in named
    )


@pytest.mark.parametrize(
    ("environment", "overrides", "has_config", "is_for_gpus"),
    [
        ({}, [], True, True),  # single_gpu.yaml, t4.yaml
        ({}, [], False, False),  # python src/sft.py, or accelerate launch without a config
        ({"ACCELERATE_USE_CPU": "true"}, [], True, False),  # cpu.yaml
        ({"WORLD_SIZE": "2"}, [], False, True),
        ({"WORLD_SIZE": "2"}, ["training.use_cpu=true"], False, False),
        ({"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "-1,-1"}, [], True, False),  # cpu_ddp.yaml
    ],
)
def test_who_starts_processes_for_gpus_is_known(
    environment, overrides, has_config, is_for_gpus, launched, monkeypatch
):
    launched({**VISIBLE, **environment})
    monkeypatch.setattr(compatibility, "names_config", lambda: has_config)
    recipe = load_recipe(QUICKSTART, overrides)
    assert compatibility.is_for_gpus(recipe, requested_strategy()) == is_for_gpus


@pytest.mark.parametrize(
    ("capability", "compiled", "is_there"),
    [
        ((7, 5), ["sm_75", "sm_80", "sm_90", "compute_120"], True),
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_120"], False),
        ((8, 9), ["sm_75", "sm_86"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((12, 1), ["sm_90", "compute_120"], True),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_known(capability, compiled, is_there):
    assert devices.has_kernels(capability, compiled) == is_there


def test_a_gpu_without_kernels_is_refused_with_the_wheel_that_has_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (7, 0))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Tesla V100")
    with pytest.raises(
        UserError, match=r"^Tesla V100 .* 7\.0.*sm_75, sm_80 only.*\+cu126 .*whl/cu126"
    ):
        devices.require_kernels()
