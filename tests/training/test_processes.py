"""Two processes, shared out in every way that a CPU can run, train what one process trains."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import tiny
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from trainings import (
    GLOBAL_BATCH,
    LORA_TARGETS,
    figures_of,
    losses_of,
    recipe_of,
    trained,
    write_pairs,
    write_rows,
)
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("all_warm")]

STEPS = 10


class Case(NamedTuple):
    """What is trained, by one process and by two."""

    architecture: str
    method: str
    """full; lora, a new adapter; or begun, an adapter that was trained before"""
    layout: str
    accumulation: int
    reader: str = "prompt_response"
    """or preference"""

    def __str__(self) -> str:
        return "-".join(map(str, self))


CASES = [
    Case("gpt2", "full", "packed", 1),
    Case("gpt2", "full", "padded", 2),
    Case("gpt2", "lora", "packed", 2),
    Case("gpt2", "begun", "packed", 1),
    Case("bloom", "full", "packed", 2),
    Case("llama", "full", "packed", 1),
    Case("llama", "lora", "padded", 1),
    Case("gpt2", "full", "packed", 2, "preference"),
    Case("llama", "lora", "padded", 1, "preference"),
    Case("llama", "begun", "packed", 1, "preference"),
]
# accelerate config -> what runs, a class of the prepared model, the share that a process has of
# weights and moments
STRATEGIES = {
    "cpu_ddp": ("ddp, 2 processes", "DistributedDataParallel", 1.0, 1.0),
    "zero1": ("zero1, 2 processes", "DeepSpeedEngine", 1.0, 0.5),
    "zero2": ("zero2, 2 processes", "DeepSpeedEngine", 1.0, 0.5),
    "zero3": ("zero3, 2 processes", "DeepSpeedEngine", 0.5, 0.5),
    "fsdp2": ("fsdp, 2 processes", "FSDPModule", 0.5, 0.5),
}


def launch_command(config: str | Path, *command: object, processes: int = 2) -> list[str]:
    """`accelerate launch` as a user gives it, on a port that is free."""
    accelerate = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        str(config),
    ]
    return [
        *accelerate,
        "--num_processes",
        str(processes),
        "--main_process_port",
        "0",
        *map(str, command),
    ]


def launch(config: str | Path, *command: object, processes: int = 2) -> subprocess.CompletedProcess:
    return subprocess.run(
        launch_command(config, *command, processes=processes),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/src:{ROOT}/tests"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, tuple[str, Path]]:
    """{architecture: (architecture, folder)}, wide enough for ZeRO-3 to share out matrices: over
    100,000 numbers.
    """
    found = {}
    for kind in ("gpt2", "llama", "bloom"):
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = tiny.byte_level()
        tiny.model_of(kind, vocab_size=len(tokenizer), width=256).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[kind] = kind, folder
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Path]:
    """{reader: file}"""
    folder = tmp_path_factory.mktemp("rows")
    return {"prompt_response": write_rows(folder), "preference": write_pairs(folder)}


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    """{architecture: folder of an adapter whose answers are not the base's}"""
    found = {}
    for kind in ("gpt2", "llama"):
        found[kind] = tmp_path_factory.mktemp(f"adapter of {kind}")
        base = AutoModelForCausalLM.from_pretrained(bases[kind][1])
        targets = LORA_TARGETS[kind].strip("[]").split(", ")
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(**settings, init_lora_weights=False))
        adapted.save_pretrained(found[kind])
    return found


def overrides_of(case: Case, processes: int, adapters: dict[str, Path]) -> list[str]:
    micro_batch = GLOBAL_BATCH // case.accumulation // processes
    found = [f"data.layout={case.layout}", f"data.reader={case.reader}"]
    found += [f"training.per_device_train_batch_size={micro_batch}"]
    found += [f"training.global_batch_size={GLOBAL_BATCH}", f"training.max_steps={STEPS}"]
    if case.method != "full":
        targets = LORA_TARGETS[case.architecture]
        found.append(f"lora={{r: 4, lora_alpha: 8, target_modules: {targets}}}")
    if case.method == "begun":
        found.append(f"model.adapter={adapters[case.architecture]}")
    return found


@pytest.fixture(scope="module")
def alone(bases, rows, adapters, tmp_path_factory) -> dict:
    """{case: trainer} of one process."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for case in CASES:
        overrides = overrides_of(case, 1, adapters)
        base, output = bases[case.architecture], folder / str(case)
        found[case] = trained(recipe_of(base, rows[case.reader], output, *overrides))
    return found


@pytest.fixture(scope="module", params=STRATEGIES)
def together(request, bases, rows, adapters, tmp_path_factory) -> tuple[str, Path]:
    """(strategy, folder with what two processes found for each case)"""
    folder = tmp_path_factory.mktemp(request.param)
    cases = {}
    for case in CASES:
        recipe_of(bases[case.architecture], rows[case.reader], folder / str(case))
        cases[str(case)] = (str(folder / f"{case}.yaml"), overrides_of(case, 2, adapters))
    (folder / "cases.json").write_text(json.dumps(cases))
    config = f"accelerate_configs/{request.param}.yaml"
    around = ["tests/fsdp_on_cpu.py"] if request.param == "fsdp2" else []
    done = launch(config, *around, "tests/processes.py", folder / "cases.json", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder


@pytest.mark.parametrize("strategy", ["cpu_ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_in_half_precision_have_the_losses_of_float32(
    strategy, alone, bases, rows, tmp_path
):
    """The formats of GPUs: accelerate's FSDP2 would round the loss."""
    case, cases = CASES[0], {}
    for half in ("bf16", "fp16"):
        recipe_of(bases[case.architecture], rows[case.reader], tmp_path / half)
        overrides = [*overrides_of(case, 2, {}), f"training.{half}=true"]
        cases[half] = (str(tmp_path / f"{half}.yaml"), overrides)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    around = ["tests/fsdp_on_cpu.py"] if strategy == "fsdp2" else []
    config = f"accelerate_configs/{strategy}.yaml"
    done = launch(config, *around, "tests/processes.py", tmp_path / "cases.json", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for half in cases:
        found = json.loads((tmp_path / f"{half}.json").read_text())
        assert found["strategy"] == STRATEGIES[strategy][0]
        assert found["losses"] == pytest.approx(losses_of(alone[case]), rel=1e-2), half
        assert found["losses"] != losses_of(alone[case]), half


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_gpus_in_their_own_format_have_the_losses_of_one(
    strategy, alone, bases, rows, tmp_path, record_property
):
    case = CASES[0]
    recipe_of(bases[case.architecture], rows[case.reader], tmp_path / "two")
    cases = {"two": (str(tmp_path / "two.yaml"), overrides_of(case, 2, {}))}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    config = f"accelerate_configs/{strategy}.yaml"
    done = launch(config, "tests/processes.py", tmp_path / "cases.json", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found, one = json.loads((tmp_path / "two.json").read_text()), losses_of(alone[case])
    record_property("losses of one GPU, of two", f"{one[-1]:.4f}, {found['losses'][-1]:.4f}")
    assert found["losses"] == pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_train_what_one_trains(together, alone, bases, case):
    strategy, folder = together
    found, one = json.loads((folder / f"{case}.json").read_text()), alone[case]
    runs, wrapper, weights, moments = STRATEGIES[strategy]
    assert found["strategy"] == runs and wrapper in found["wrappers"]
    assert (found["weights"], found["moments"]) == (
        pytest.approx(weights, abs=0.03),
        pytest.approx(moments, abs=0.03),
    )

    assert len(found["losses"]) == STEPS
    for figure, values in figures_of(one).items():
        # Of the norm a step repeats the rounding of all steps before it.
        tolerance = {"rel": 5e-5 if figure == "grad_norm" else 1e-5, "abs": 1e-6}
        assert found["figures"][figure] == pytest.approx(values, **tolerance), figure
    evaluated = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert found["eval"] == pytest.approx(evaluated, rel=1e-5)
    trained_weights = one.model.state_dict()
    reloaded = load(folder / str(case), bases[case.architecture][1], case.method)
    assert reloaded.keys() == trained_weights.keys()
    for key, weight in trained_weights.items():
        assert (reloaded[key] - weight).abs().max() <= 1e-5, key


def load(folder: Path, base: Path, method: str) -> dict[str, torch.Tensor]:
    """The saved weights, as anyone loads them."""
    if method == "full":
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert (folder / "adapter_model.safetensors").stat().st_size < 300_000
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder
    ).state_dict()


GPUS = [
    pytest.param("single_gpu", marks=pytest.mark.gpu),
    *(pytest.param(config, marks=pytest.mark.gpu(count=2)) for config in ("ddp", "zero3_offload")),
]


@pytest.mark.parametrize("config", ["cpu", "cpu_ddp", "zero1", "zero2", "zero3", "fsdp2", *GPUS])
def test_every_accelerate_config_trains_the_quickstart(config, tmp_path):
    overrides = [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=2"]
    processes = 1 if config in ("cpu", "single_gpu") else 2
    around = ["tests/fsdp_on_cpu.py"] if config == "fsdp2" and not torch.cuda.is_available() else []
    command = [*around, "src/sft.py", "recipes/quickstart.yaml", *overrides]
    done = launch(f"accelerate_configs/{config}.yaml", *command, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    (ran,) = environment["launches"]
    asked = {"fsdp2": "fsdp", "cpu_ddp": "ddp", "zero3_offload": "zero3"}
    assert (ran["strategy"], ran["processes"]) == (
        "single" if processes == 1 else asked.get(config, config),
        processes,
    )
    assert environment["finished"]
    assert done.stdout.count("evaluation loss") == 1


# A process that dies, and one that hangs


@pytest.fixture
def pair(tmp_path):
    """(launcher, [rank 0, rank 1], log) of two processes in the middle of a long training."""
    folder, log = tmp_path / "run", tmp_path / "log"
    overrides = [
        f"training.output_dir={folder}",
        "training.logging_steps=1",
        "training.ddp_timeout=15",
    ]
    with log.open("w") as stream:
        launcher = psutil.Popen(
            launch_command(
                "accelerate_configs/cpu_ddp.yaml",
                "src/sft.py",
                "recipes/quickstart.yaml",
                *overrides,
            ),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 240
        while (
            not (folder / "metrics.jsonl").exists()
            or len((folder / "metrics.jsonl").read_text().splitlines()) < 5
        ):
            assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        ranks = sorted(launcher.children(), key=lambda process: process.pid)
        yield launcher, ranks, log
        for process in [launcher, *ranks]:
            if process.is_running():
                process.kill()


def test_a_process_that_dies_takes_the_others_down_and_is_named_first(pair):
    launcher, (first, second), log = pair
    # torch's launcher looks from time to time: of two that have ended since, it names the lower.
    first.suspend()
    second.kill()
    second.wait(60)
    first.resume()
    assert launcher.wait(60) != 0
    assert not first.is_running() or first.wait(40) is not None
    cause = log.read_text().split("Root Cause (first observed failure)")[1]
    assert "rank      : 1" in cause and f"Signal 9 (SIGKILL) received by PID {second.pid}" in cause


def test_a_process_that_waits_for_another_says_where(pair):
    _, (_, second), log = pair
    second.suspend()
    deadline = time.monotonic() + 40
    while "has waited" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    said = r"rank 0 on \S+ has waited 5 s, after step \d+, in \w+ \(\w+\.py:\d+\) <- "
    assert re.search(said, log.read_text())
