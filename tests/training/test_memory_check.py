"""The longest batch first: it is the longest, it leaves no trace, and what does not fit ends in one
line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from run_folders import interrupted
from safetensors.torch import load_file

import sft
from finetuning.data.batch_sampler import BatchSampler
from finetuning.errors import UserError, is_out_of_memory
from finetuning.training import memory_check, start_checks
from finetuning.training.trainer import ResponseTrainer

QUICK = [
    "training.global_batch_size=null",
    "training.max_steps=4",
    "training.report_to=none",
    "training.logging_steps=1",
    "generation.prompts=[]",
]
DROPOUT = [
    f"model.from_scratch.config.{name}=0.1" for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def trained(folder: Path, *overrides: str) -> Path:
    sft.main(["recipes/quickstart.yaml", *QUICK, f"training.output_dir={folder}", *overrides])
    return folder


def losses_in(folder: Path) -> list[float]:
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in logged if "loss" in entry]


# Which batch


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"tokens": 90}, {"by_length": True}, {"seed": None}], ids=str
)
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 7, 40])
def test_it_is_the_longest_that_any_process_gets(processes, settings, is_padded, micro_batches):
    lengths = np.random.default_rng(0).integers(1, 60, 50)
    common = {"batch_size": 4, "accumulation": 2, "seed": 3, "processes": processes, **settings}
    sizes = []
    for process in range(processes):
        sampler = BatchSampler(lengths, process=process, **common)
        found = []
        for epoch in range(-(-micro_batches // len(sampler))):
            sampler.set_epoch(epoch)
            found += [lengths[[max(number, ~number) for number in batch]] for batch in sampler]
        sizes += [of.max() * len(of) if is_padded else of.sum() for of in found[:micro_batches]]
    longest = lengths[BatchSampler(lengths, **common).longest(micro_batches, is_padded)]
    assert (longest.max() * len(longest) if is_padded else longest.sum()) == max(sizes)


def test_the_batch_that_is_checked_is_the_longest_of_those_that_are_trained(tmp_path, monkeypatch):
    seen, step = [], ResponseTrainer.training_step

    def watched(trainer, model, inputs, *args):
        seen.append(inputs)
        return step(trainer, model, inputs, *args)

    monkeypatch.setattr(ResponseTrainer, "training_step", watched)
    trained(tmp_path / "run", "training.eval_strategy=no", "data.eval=null")
    measured, *later = [sum(batch["lengths"]) for batch in seen]
    assert measured == max(later) and len(later) == 4


# No trace


@pytest.mark.parametrize(
    "more", [[], ["training.gradient_accumulation_steps=2"]], ids=["one", "accumulated"]
)
def test_training_is_the_same_with_and_without(tmp_path, monkeypatch, more):
    """With dropout, which draws random numbers, and a checkpoint to go on from."""
    with_it = trained(tmp_path / "with", *DROPOUT, *more)
    others = tuple(check for check in start_checks.CHECKS if check is not memory_check.check_memory)
    assert len(others) == len(start_checks.CHECKS) - 1
    monkeypatch.setattr(start_checks, "CHECKS", others)
    without = trained(tmp_path / "without", *DROPOUT, *more)
    first, second = (load_file(folder / "model.safetensors") for folder in (with_it, without))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses_in(with_it) == losses_in(without)


WITHOUT = (
    "checks = start_checks.CHECKS; "
    "start_checks.CHECKS = tuple(each for each in checks if each is not start_checks.check_memory)"
)
LAUNCHED = """
import sys
sys.path.insert(0, "src")
import finetuning.script as script, finetuning.training.start_checks as start_checks, sft
{}
script.run(sft.main, "")
"""


@pytest.mark.cluster
@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize("config", ["cpu_ddp", "zero2", "zero3"])
def test_two_processes_train_the_same_with_and_without(tmp_path, config):
    runs = []
    for name, more in (("with", ""), ("without", WITHOUT)):
        script, folder = tmp_path / f"{name}.py", tmp_path / name
        script.write_text(LAUNCHED.format(more))
        launch = [
            "accelerate.commands.launch",
            "--config_file",
            f"accelerate_configs/{config}.yaml",
        ]
        settings = [
            *QUICK,
            *DROPOUT,
            "training.gradient_accumulation_steps=2",
            f"training.output_dir={folder}",
        ]
        words = [*launch, "--num_processes", "2", str(script), "recipes/quickstart.yaml", *settings]
        done = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(load_file(folder / "model.safetensors"))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# What does not fit


def out_of_memory_above(size: int, monkeypatch) -> list[int]:
    """Has a micro-batch of more examples fail as torch does; returns the sizes that are tried."""
    tried, compute = [], memory_check.compute

    def limited(trainer, batch):
        tried.append(len(batch["lengths"]))
        if len(batch["lengths"]) > size:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: "
                "..."
            )
        compute(trainer, batch)

    monkeypatch.setattr(memory_check, "compute", limited)
    return tried


def test_the_micro_batch_halves_and_the_examples_of_a_step_stay(tmp_path, monkeypatch):
    overrides = [
        *DROPOUT,
        "training.per_device_train_batch_size=16",
        "training.auto_find_batch_size=true",
    ]
    tried = out_of_memory_above(5, monkeypatch)
    found = trained(tmp_path / "found", *overrides)
    assert tried == [16, 8, 4]
    said = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=4"]
    as_said = trained(tmp_path / "said", *DROPOUT, *said)
    first, second = (load_file(folder / "model.safetensors") for folder in (found, as_said))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses_in(found) == losses_in(as_said)


def test_an_odd_micro_batch_is_divided_too(tmp_path, monkeypatch):
    tried = out_of_memory_above(2, monkeypatch)
    trained(
        tmp_path, "training.per_device_train_batch_size=9", "training.auto_find_batch_size=true"
    )
    assert tried == [9, 3, 1]


def test_what_does_not_fit_is_said_with_what_would(tmp_path, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(UserError) as caught:
        trained(tmp_path, "training.per_device_train_batch_size=8")
    said = str(caught.value)
    assert said.startswith("out of memory on the longest micro-batch (8 examples, ")
    for remedy in (
        "per_device_train_batch_size=4",
        "activation_checkpointing=true",
        "a lora section",
        "max_length",
    ):
        assert remedy in said
    with pytest.raises(UserError, match=r"^out of memory on the longest micro-batch \(1 examples"):
        trained(
            tmp_path, "training.per_device_train_batch_size=2", "training.auto_find_batch_size=true"
        )


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_ends_in_a_library_of_the_gpu_is_memory_that_ended(message):
    assert is_out_of_memory(RuntimeError(message))


def test_another_error_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_check, "compute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path)


LIMITED = """
import resource, sys
import finetuning.training.start_checks as start_checks, finetuning.script as script, sft

check_memory = start_checks.check_memory
def with_little_memory(trainer, run):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**20, resource.RLIM_INFINITY))
    check_memory(trainer, run)
start_checks.CHECKS = tuple(
    with_little_memory if check is check_memory else check for check in start_checks.CHECKS
)
script.run(sft.main, "")
"""


def with_little_memory(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    script.write_text(LIMITED)
    return subprocess.run(
        [sys.executable, script, "recipes/quickstart.yaml", *QUICK, *arguments],
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
    )


@pytest.mark.usefixtures("warm_python")
def test_memory_that_ends_is_one_line_and_a_checkpoint_is_as_it_was(tmp_path):
    """The real thing: the process may have 4 MiB more than when the check begins."""
    wide = [
        "training.per_device_train_batch_size=530",
        "training.max_steps=2",
        "training.save_total_limit=null",
    ]
    wide += [
        "training.save_strategy=steps",
        "training.save_steps=1",
        "training.eval_strategy=no",
        "data.eval=null",
    ]
    folder = trained(tmp_path, *wide)
    interrupted(folder, "checkpoint-2", "model.safetensors")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    script = tmp_path.with_name("limited.py")
    done = with_little_memory(script, f"training.output_dir={folder}", *wide)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of memory on the longest micro-batch (530 examples, ")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
