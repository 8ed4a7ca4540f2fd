"""A run that is killed, or asked to stop, at any of twenty instants ends as one that is left alone.

Each start is a fork of this process, which has trained the same run once: it costs half a second.
Two processes, ZeRO and FSDP are killed in test_resume.py. Preference tuning is the same run, with a
reference before its first step.
"""

import atexit
import gc
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGKILL, SIGTERM, SIGUSR1
from types import ModuleType
from typing import Any, NamedTuple

import huggingface_hub.constants
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from trainings import lines_of_rows

import dpo
import sft
from finetuning import script
from finetuning.data import cache, prepare, storage
from finetuning.errors import REQUEUE
from finetuning.launch.strategy import launch_environment
from finetuning.runs import checkpoints
from finetuning.runs.folder import RunFolder
from finetuning.training import callbacks, memory_check, reference, resumable, start_checks, train
from finetuning.training.preference_trainer import PreferenceTrainer
from finetuning.training.trainer import ResponseTrainer

SOFT = [SIGTERM, SIGUSR1, SIGHUP]
RECIPE = """
model: {name: FOLDER/model}
data:
  path: FOLDER/rows.jsonl
  reader: READER
  template: question_answer
  eval: {every: 9}
training:
  output_dir: FOLDER/whole 1
  max_steps: 24
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 3e-3
  logging_steps: 2
  save_strategy: steps
  save_steps: 3
  save_total_limit: 1
  eval_strategy: steps
  eval_steps: 4
generation: {prompts: [What is 2 + 2?], max_new_tokens: 4}
evaluation: {questions: 1}
"""


class Instant(NamedTuple):
    """When a function is called for the so-manieth time in a process."""

    owner: Any
    name: str
    call: int = 1
    within: "Instant | None" = None
    """calls are counted from this instant on"""


BEFORE = {
    "rows are prepared": Instant(prepare.Preparation, "__call__", 2),
    "prepared rows are written": Instant(storage, "write_array", 3),
    "prepared rows are in place": Instant(cache, "read_prepared", 2),
    "the model is loaded": Instant(train, "load_model"),
}
DURING = {
    "the untrained model is asked": Instant(start_checks, "ask_before_training"),
    "the start is noted": Instant(start_checks, "write_start"),
    "packing is checked": Instant(start_checks, "require_isolation"),
    "the longest batch is checked": Instant(memory_check, "compute"),
    "half of a step is done": Instant(ResponseTrainer, "training_step", 3),
    "the optimizer steps": Instant(torch.optim.AdamW, "step"),
    "a loss is logged": Instant(callbacks, "append_metrics"),
    "the model is evaluated": Instant(ResponseTrainer, "prediction_step"),
    "a checkpoint is written": Instant(torch, "save"),
    "a checkpoint is sealed": Instant(checkpoints, "sync"),
    "an old checkpoint is removed": Instant(shutil, "rmtree", 1, Instant(checkpoints, "remove", 2)),
}
OF_REFERENCE = {
    "the reference is computed": Instant(PreferenceTrainer, "log_probs", 3),
    "the reference is cached": Instant(reference, "keep"),
    "the reference is compared": Instant(reference, "require_own_reference"),
    "the reference is written": Instant(reference, "write_bytes", 2),
    "the reference is known": Instant(start_checks, "ask_before_training"),
}
FINISHED = ("the report is written", "the last line is printed", "Python ends")
AFTER = {
    "the weights are saved": Instant(ResponseTrainer, "save_trained"),
    "the weights are moved": Instant(Path, "replace", 3, Instant(resumable, "move_into")),
    "the trained model is asked": Instant(train, "ask_after_training"),
    "answers are scored": Instant(train, "evaluate_trained"),
    "the end is noted": Instant(train, "write_finish"),
    "the report is written": Instant(train, "write_report"),
    "the last line is printed": Instant(script, "ignore_signals"),
    "Python ends": Instant(script, "exit_without_finalizers"),
}


def lines_of_pairs(count: int) -> str:
    rows = [json.loads(line) for line in lines_of_rows(count).splitlines()]
    pairs = [{**row, "chosen": row["response"], "rejected": "I do not know."} for row in rows]
    return "".join(json.dumps(pair) + "\n" for pair in pairs)


class Home(NamedTuple):
    """A folder with a recipe, its rows and its model, which has dropout; and the whole run."""

    folder: Path
    script: ModuleType

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def home_of(folder: Path, script: ModuleType, reader: str, rows: str) -> Home:
    tiny.write_base(folder / "model", "gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    (folder / "rows.jsonl").write_text(rows)
    recipe = RECIPE.replace("FOLDER", str(folder)).replace("READER", reader)
    (folder / "recipe.yaml").write_text(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(folder / "cache of whole"))
        script.main([str(folder / "recipe.yaml")])
    importlib.import_module("detect_secrets")  # as a script that is stopped does
    return Home(folder, script)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    folder = tmp_path_factory.mktemp("killed")
    return home_of(folder, sft, "prompt_response", lines_of_rows(36))


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> Home:
    folder = tmp_path_factory.mktemp("preferences")
    return home_of(folder, dpo, "preference", lines_of_pairs(36))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Rows are prepared in each test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))


def start(
    home: Home, run: Path, instant: Instant | None = None, number: int = 0, processes: int = 1
) -> int:
    """Exit code of `python src/sft.py`, or src/dpo.py, in forks, all of which get this signal when
    one comes to the instant.
    """
    children = []
    port = free_port() if processes > 1 else 0
    for rank in range(processes):
        child = os.fork()
        if not child:
            try:
                if processes > 1:
                    join(rank, processes, port)
                become(home, run, instant, number)
            finally:
                os._exit(99)
        children.append(child)
        os.setpgid(child, children[0])  # before any comes that far
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes[0]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def join(rank: int, processes: int, port: int) -> None:
    """Becomes one of several, as a launcher would have started it."""
    config = launch_environment("accelerate_configs/cpu_ddp.yaml", str(processes))
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ |= config | ranks | place
    AcceleratorState._reset_state(reset_partial_state=True)


def become(home: Home, run: Path, instant: Instant | None, number: int) -> None:
    gc.freeze()  # to look through what is shared would be to copy it
    atexit._clear()  # what pytest has registered
    for each in (SIGTERM, SIGUSR1, SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    sys.stdout = sys.stderr = run.with_suffix(".log").open("a", buffering=1)
    sys.argv = [
        f"src/{home.script.__name__}.py",
        str(home / "recipe.yaml"),
        f"training.output_dir={run}",
    ]
    if "WORLD_SIZE" in os.environ:  # the same step
        sys.argv.append("training.gradient_accumulation_steps=1")
    # Rows are prepared by whoever is first, and the end is that of the first process.
    if instant and (instant in BEFORE.values() or os.environ.get("RANK", "0") == "0"):
        at(instant, lambda: os.killpg(0, number))
    try:
        script.run(home.script.main, home.script.__doc__)
    except SystemExit as end:
        atexit._run_exitfuncs()
        os._exit(end.code)


def at(instant: Instant, act: Callable[[], None]) -> None:
    """Has this process act when it comes to the instant."""
    if instant.within:
        at(instant.within, lambda: at(instant._replace(within=None), act))
        return
    whole, calls = getattr(instant.owner, instant.name), []

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == instant.call:
            act()
        return whole(*arguments, **settings)

    setattr(instant.owner, instant.name, counted)


def is_finished(run: Path) -> bool:
    return (run / "environment.json").exists() and RunFolder(run).is_finished


def require_whole(run: Path, whole: Path) -> None:
    """The run is finished, and as the one that was left alone."""
    for name in ("model.safetensors", "samples.json", "answers.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("loss", "eval_loss", "train_loss", "rewards/margins"):
        assert RunFolder(run).curve(name) == RunFolder(whole).curve(name)
    assert is_finished(run) and checkpoints.content_damage(run) is None
    assert "Traceback" not in run.with_suffix(".log").read_text()


def require_left_alone(home: Home, run: Path, processes: int) -> None:
    """By the same command."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert start(home, run, processes=processes) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert " is finished (" in run.with_suffix(".log").read_text()


def go_everywhere(home: Home, run: Path, numbers: Iterator[int], processes: int = 1) -> None:
    """The run meets a signal at each instant, and is started again."""
    for (name, instant), number in zip((BEFORE | DURING).items(), numbers, strict=False):
        code = -SIGKILL if number == SIGKILL else REQUEUE
        assert start(home, run, instant, number, processes) == code, name
        assert not is_finished(run), name
    # From its last step on, since a signal that asks to stop does not any more.
    begun = start(home, run, AFTER["the weights are saved"], SIGKILL, processes)
    assert begun == -SIGKILL and not is_finished(run)
    for (name, instant), number in zip(AFTER.items(), numbers, strict=False):
        copy = shutil.copytree(run, run.with_name(f"{run.name} {name}"))
        code = start(home, copy, instant, number, processes)
        if number == SIGKILL:
            assert (code, is_finished(copy)) == (-SIGKILL, name in FINISHED), name
            code = start(home, copy, processes=processes)
        assert code == 0, name
        require_whole(copy, home / f"whole {processes}")
    require_left_alone(home, copy, processes)


def test_killed_at_each_instant_in_turn_it_ends_as_if_it_had_not_been(home, tmp_path, own_cache):
    go_everywhere(home, tmp_path / "run", itertools.repeat(SIGKILL))


@pytest.mark.parametrize(
    "turn", [0, *(pytest.param(number, marks=pytest.mark.cluster) for number in (1, 2))]
)
def test_asked_to_stop_at_each_instant_in_turn_it_ends_as_if_it_had_not_been(
    home, tmp_path, own_cache, turn
):
    """Three turns, and each signal has come at each instant."""
    go_everywhere(home, tmp_path / "run", itertools.cycle(SOFT[turn:] + SOFT[:turn]))


@pytest.mark.cluster
@pytest.mark.parametrize("turn", range(4))
def test_two_processes_end_as_if_they_had_not_been_stopped(home, tmp_path, own_cache, turn):
    """Four turns, and each signal has come at each instant."""
    assert start(home, home / "whole 2", processes=2) == 0
    shutil.rmtree(tmp_path / "cache")
    numbers = [SIGKILL, *SOFT]
    go_everywhere(home, tmp_path / "run", itertools.cycle(numbers[turn:] + numbers[:turn]), 2)


@pytest.mark.cluster
@pytest.mark.parametrize("turn", range(4))
def test_preference_tuning_ends_as_if_it_had_not_been_stopped(
    preferences, tmp_path, own_cache, turn
):
    """Four turns, and each signal has come at each instant, those of the reference among them."""
    numbers = [SIGKILL, *SOFT]
    numbers = numbers[turn:] + numbers[:turn]
    for (name, instant), number in zip(OF_REFERENCE.items(), itertools.cycle(numbers)):
        run = tmp_path / name
        code = -SIGKILL if number == SIGKILL else REQUEUE
        assert start(preferences, run, instant, number) == code and not is_finished(run), name
        if name == "the reference is computed":
            assert not (run / "reference.npz").exists() and not [*run.glob("checkpoint-*")]
        assert start(preferences, run) == 0
        require_whole(run, preferences / "whole 1")
        shutil.rmtree(tmp_path / "cache")
    go_everywhere(preferences, tmp_path / "run", itertools.cycle(numbers))


@pytest.mark.cluster
@pytest.mark.parametrize("number", [SIGKILL, SIGUSR1])
def test_two_processes_that_compute_a_reference_end_as_if_they_had_not_been_stopped(
    preferences, tmp_path, own_cache, number
):
    assert start(preferences, preferences / "whole 2", processes=2) == 0
    shutil.rmtree(tmp_path / "cache")
    for name, instant in OF_REFERENCE.items():
        run = tmp_path / name
        code = -SIGKILL if number == SIGKILL else REQUEUE
        assert start(preferences, run, instant, number, 2) == code and not is_finished(run), name
        assert start(preferences, run, processes=2) == 0
        require_whole(run, preferences / "whole 2")
        shutil.rmtree(tmp_path / "cache")
