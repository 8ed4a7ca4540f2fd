"""A run that is killed, at any instant and as often as you like, ends with the same weights and
losses, bit for bit.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from conftest import ROOT
from safetensors.torch import load_file
from trainings import lines_of_rows

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("all_warm")]

STEPS = 60  # of 8 examples; an epoch has 7
EVERY = 7 + 4  # steps from one checkpoint to the next: in the middle of epochs and over their ends
# accelerate config, layout, micro-batches of a step
SINGLE, DDP, ZERO2 = ("cpu", "packed", 2), ("cpu_ddp", "padded", 2), ("zero2", "packed", 1)
ZERO3, FSDP2 = ("zero3", "padded", 2), ("fsdp2", "packed", 1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A model with dropout, so that random numbers matter, and rows of different lengths."""
    folder = tmp_path_factory.mktemp("resume")
    tiny.write_base(folder / "model", "gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    lines = lines_of_rows(63)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "many.jsonl").write_text(lines * 20, encoding="utf-8")
    text = f"""
model: {{name: {folder / "model"}}}
data:
  path: {folder / "rows.jsonl"}
  reader: prompt_response
  template: question_answer
  eval: {{every: 9}}
training:
  output_dir: {folder / "run"}
  max_steps: {STEPS}
  global_batch_size: 8
  learning_rate: 3e-3
  logging_steps: 3
  save_strategy: steps
  save_steps: {EVERY}
  save_total_limit: 2
  eval_strategy: epoch
generation: {{prompts: [What is 2 + 2?], max_new_tokens: 4}}
"""
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    tiny.write_base(folder / "plain", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0)
    return folder / "recipe.yaml"


class Run:
    """One command, given again and again."""

    def __init__(
        self, recipe: Path, folder: Path, config: str, layout: str, accumulation: int, *changes: str
    ) -> None:
        self.folder = folder
        processes = 1 if config == "cpu" else 2
        accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch"]
        place = [
            "--config_file",
            f"accelerate_configs/{config}.yaml",
            "--num_processes",
            str(processes),
        ]
        micro_batch = f"training.per_device_train_batch_size={8 // processes // accumulation}"
        overrides = [
            f"training.output_dir={folder}",
            f"data.layout={layout}",
            micro_batch,
            *changes,
        ]
        script = ["tests/fsdp_on_cpu.py", "src/sft.py"] if config == "fsdp2" else ["src/sft.py"]
        self.command = [
            *accelerate,
            *place,
            "--main_process_port",
            "0",
            *script,
            str(recipe),
            *overrides,
        ]
        self.codes = folder.with_name(f"{folder.name}.codes")

    def start(self) -> psutil.Popen:
        shutil.rmtree(self.codes, ignore_errors=True)
        self.codes.mkdir(parents=True)
        self.log = self.folder.with_name(f"{self.folder.name}.log").open("w+")
        environment = {**os.environ, "EXIT_CODES": str(self.codes)}
        return psutil.Popen(
            self.command, cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def until(self, process: psutil.Popen, is_time: Callable[[], bool]) -> list[psutil.Process]:
        """Waits; returns the launcher and all processes that it started. Fails where the run ends
        before.
        """
        deadline = time.monotonic() + 240
        while not is_time():
            assert process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.002)
        return [process, *process.children(recursive=True)]

    def finish(self) -> None:
        process = self.start()
        assert process.wait(240) == 0, self.said()

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()[-3000:]

    @property
    def logged(self) -> list[dict]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    @property
    def step(self) -> int:
        return max((entry["step"] for entry in self.logged), default=0)

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """(step, loss, accuracy) as logged, of training and of evaluation; at the end the mean of
        all steps.
        """
        return [
            (entry["step"], entry[f"{part}loss"], entry.get(f"{part}mean_token_accuracy", 0.0))
            for entry in self.logged
            for part in ("", "eval_", "train_")
            if f"{part}loss" in entry
        ]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoint-*"))

    def is_writing(self) -> bool:
        return any((self.folder / ".unfinished").glob("checkpoint-*/*"))


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.suspend()  # at the same instant, as far as that goes
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)


def kill_while_it_writes(run: Run, process: psutil.Popen) -> None:
    """Some saves are over before all processes stand still: those are let go, until the next
    one."""
    while True:
        processes = run.until(process, run.is_writing)
        for each in processes:
            each.suspend()
        if run.is_writing():
            return kill(processes)
        for each in processes:
            each.resume()


def require_equal(run: Run, whole: Run) -> None:
    assert run.losses == whole.losses and run.losses[-1][0] == STEPS
    ours, theirs = (load_file(each.folder / "model.safetensors") for each in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    samples = [(each.folder / "samples.json").read_text(encoding="utf-8") for each in (run, whole)]
    assert samples[0] == samples[1]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Callable[..., Run]:
    """A function that gives an uninterrupted run, made once."""

    @functools.cache
    def run(*how: str | int) -> Run:
        uninterrupted = Run(recipe, tmp_path_factory.mktemp("whole") / "run", *how)
        uninterrupted.finish()
        return uninterrupted

    return run


@pytest.mark.parametrize("how", [SINGLE, DDP, ZERO2, ZERO3], ids=lambda how: how[0])
def test_killed_at_five_instants_it_ends_as_if_it_had_not_been(whole, recipe, tmp_path, how):
    run = Run(recipe, tmp_path / "run", *how)
    instants = sorted(random.Random(str(how)).sample(range(2, STEPS - 15), 4))
    for number, instant in enumerate(instants):
        process = run.start()
        kill(run.until(process, lambda instant=instant: run.step >= instant))
        assert not (run.folder / "model.safetensors").exists()
        if number == 1:
            kill_while_it_writes(run, run.start())
            assert (run.folder / ".unfinished").exists()
    run.finish()
    require_equal(run, whole(*how))
    assert not (run.folder / ".unfinished").exists()
    assert len(run.checkpoints) == 2


@pytest.mark.parametrize(
    ("how", "number"),
    [
        pytest.param(how, number, id=f"{how[0]}-{number.name}")
        for how, number in [
            (SINGLE, signal.SIGTERM),
            (DDP, signal.SIGTERM),
            (DDP, signal.SIGUSR1),
            (ZERO3, signal.SIGUSR1),
            (FSDP2, signal.SIGTERM),
        ]
    ],
)
def test_on_a_signal_it_saves_once_and_the_next_command_resumes(
    whole, recipe, tmp_path, how, number
):
    run = Run(recipe, tmp_path / "run", *how)
    process = run.start()
    processes = run.until(process, lambda: run.step >= 15)
    training = process.children()
    # A scheduler sends SIGUSR1 to the processes that train; torch's launcher passes SIGTERM on to
    # them.
    for receiver in training if number == signal.SIGUSR1 else [process]:
        receiver.send_signal(number)
    process.wait(120)
    psutil.wait_procs(processes, timeout=60)
    assert {file.read_text().split()[0] for file in run.codes.iterdir()} == {"75"}, run.said()
    saved = sorted(int(name.rpartition("-")[2]) for name in run.checkpoints)
    assert (
        not any(step % EVERY for step in saved[:-1]) and not (run.folder / ".unfinished").exists()
    )
    assert f"after step {saved[-1]} of {STEPS}" in run.said()
    run.finish()
    require_equal(run, whole(*how))


@pytest.mark.parametrize("how", [SINGLE, DDP], ids=lambda how: how[0])
def test_on_a_signal_while_it_evaluates_it_saves_and_evaluates_when_it_is_resumed(
    whole, recipe, tmp_path, how
):
    data = [f"data.path={recipe.parent / 'many.jsonl'}", "data.eval.every=2"]
    evaluation = [
        "eval_strategy=steps",
        "eval_steps=20",
        "per_device_eval_batch_size=1",
        "logging_steps=4",
    ]
    often = [*data, *(f"training.{setting}" for setting in evaluation)]
    run, uninterrupted = Run(recipe, tmp_path / "run", *how, *often), whole(*how, *often)
    process = run.start()
    processes = run.until(process, lambda: run.step >= 40)  # an evaluation of some seconds begins
    process.send_signal(signal.SIGTERM)
    psutil.wait_procs(processes, timeout=60)
    assert {file.read_text().split()[0] for file in run.codes.iterdir()} == {"75"}, run.said()
    assert [step for step, *_ in run.losses].count(40) == 1, "the evaluation was not cut short"
    assert "checkpoint-40" in run.checkpoints
    run.finish()
    require_equal(run, uninterrupted)


@pytest.mark.parametrize(("first", "then"), [("cpu", "cpu_ddp"), ("cpu_ddp", "cpu")])
def test_begun_by_one_process_it_may_be_resumed_by_two_and_the_other_way(
    whole, recipe, tmp_path, first, then
):
    """The same steps, so the same training but for rounding; without dropout, whose numbers are of
    each process.

    It goes on from a checkpoint between two logs: what each process had counted since the last one
    is missed if lost.
    """
    plain = f"model.name={recipe.parent / 'plain'}"
    uninterrupted = whole(*SINGLE, plain)
    accumulation = {"cpu": 2, "cpu_ddp": 1}
    begun, ended = (
        Run(recipe, tmp_path / "run", how, "packed", accumulation[how], plain)
        for how in (first, then)
    )
    kill(begun.until(begun.start(), lambda: begun.step >= EVERY + 1))
    assert any(int(name.rpartition("-")[2]) % 3 for name in begun.checkpoints)
    ended.finish()
    for (step, *figures), (expected_step, *expected) in zip(
        ended.losses, uninterrupted.losses, strict=True
    ):
        assert step == expected_step and figures == pytest.approx(expected, rel=1e-4)
    launches = json.loads((ended.folder / "environment.json").read_text())["launches"]
    strategies = {"cpu": "single", "cpu_ddp": "ddp"}
    assert [launch["strategy"] for launch in launches] == [strategies[first], strategies[then]]


@pytest.mark.parametrize("how", [DDP, ZERO2, ZERO3], ids=lambda how: how[0])
def test_every_process_ends_with_the_best_weights(recipe, tmp_path, how):
    """The best by the highest loss, which is not that of the last step."""
    often = ["max_steps=8", "eval_strategy=steps", "eval_steps=4", "save_steps=4"]
    best = ["load_best_model_at_end=true", "greater_is_better=true"]
    run = Run(
        recipe, tmp_path / "run", *how, *(f"training.{setting}" for setting in (*often, *best))
    )
    run.finish()
    found = [(entry["step"], entry["eval_loss"]) for entry in run.logged if "eval_loss" in entry]
    (_, begin), (_, first), (_, second), told = found
    assert second < first < begin and told == (8, pytest.approx(first, rel=1e-6))
