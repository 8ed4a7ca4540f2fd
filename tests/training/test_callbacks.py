"""What happens beside the steps: metrics written down, stopping together, saying where one
waits."""

import io
import json
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from transformers import TrainerControl, TrainerState

from finetuning.errors import Stopped
from finetuning.training.callbacks import MetricsFile, Watchdog
from finetuning.training.signals import Stop
from finetuning.training.stopping import SynchronizedStop

ALONE, ONE_OF_TWO = SimpleNamespace(world_size=1), SimpleNamespace(world_size=2)

# metrics.jsonl


def state_of(*losses: float, rank: int = 0) -> TrainerState:
    history = [{"loss": loss, "step": step} for step, loss in enumerate(losses, start=1)]
    return TrainerState(log_history=history, is_world_process_zero=rank == 0)


def written(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_every_log_is_a_line(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.on_train_begin(ALONE, state_of(), None)
    assert written(tmp_path) == []
    metrics.on_log(ALONE, state_of(3.0), None)
    metrics.on_log(ALONE, state_of(3.0, 2.0), None)
    assert written(tmp_path) == [3.0, 2.0]


def test_what_was_logged_after_the_checkpoint_is_removed_when_a_run_is_resumed(tmp_path):
    lines = [json.dumps({"loss": loss}) for loss in (3.0, 2.0, 1.5, 1.4)]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(lines) + '\n{"loss": 1.'
    )  # killed in the middle of a line
    metrics = MetricsFile(tmp_path)
    metrics.on_train_begin(ALONE, state_of(3.0, 2.0), None)
    assert written(tmp_path) == [3.0, 2.0]
    metrics.on_log(ALONE, state_of(3.0, 2.0, 1.0), None)
    assert written(tmp_path) == [3.0, 2.0, 1.0]


def test_only_the_first_process_writes(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.on_train_begin(ONE_OF_TWO, state_of(3.0, rank=1), None)
    metrics.on_log(ONE_OF_TWO, state_of(3.0, rank=1), None)
    assert list(tmp_path.iterdir()) == []


# Stopping together


def train(
    callback: SynchronizedStop,
    args=ALONE,
    signals=None,
    epochs: int = 2,
    save_every: int = 0,
    before_step=None,
):
    """The events of a training with 5 steps an epoch, in transformers' order; the steps and places
    of its saves.

    `signals` are heard within these steps: {step: signal}.
    """
    state, control, saves = TrainerState(max_steps=5 * epochs), TrainerControl(), []

    def save_if_asked(place: str) -> None:
        if control.should_save:
            control.should_save = False
            saves.append((state.global_step, place))
            callback.on_save(args, state, control)

    callback.on_train_begin(args, state, control)
    for step in range(1, 5 * epochs + 1):
        if before_step:
            before_step(step)
        if signals and step in signals:
            callback.stop.signal = signals[step]
        control.should_save = False
        state.global_step, state.epoch = step, (step - 1) // 5 + ((step - 1) % 5 + 1) / 5
        control.should_save = save_every > 0 and step % save_every == 0
        callback.on_step_end(args, state, control)
        save_if_asked("step")
        if step % 5 == 0:
            callback.on_epoch_end(args, state, control)
            save_if_asked("epoch")
    callback.on_train_end(args, state, control)
    return saves


def test_without_a_signal_checkpoints_come_as_the_recipe_says():
    assert train(SynchronizedStop(Stop()), save_every=3) == [(3, "step"), (6, "step"), (9, "step")]
    assert train(SynchronizedStop(Stop())) == []


def test_a_checkpoint_of_an_epoch_s_last_step_holds_what_comes_with_the_epoch_s_end():
    assert train(SynchronizedStop(Stop()), save_every=5) == [(5, "epoch"), (10, "epoch")]


def test_a_checkpoint_of_the_last_step_of_all_waits_for_the_end_too():
    """Where a run ends within an epoch, transformers ends the epoch there."""
    callback, control = SynchronizedStop(Stop()), TrainerControl(should_save=True)
    callback.on_step_end(ALONE, TrainerState(global_step=3, max_steps=3, epoch=0.6), control)
    assert not control.should_save
    callback.on_epoch_end(ALONE, TrainerState(global_step=3, max_steps=3, epoch=0.6), control)
    assert control.should_save


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1, SIGINT])
@pytest.mark.parametrize("step", [2, 5, 10])
def test_one_process_stops_after_the_step_in_which_the_signal_came(number, step):
    callback = SynchronizedStop(Stop())
    with pytest.raises(Stopped) as stopped:
        train(callback, signals={step: number})
    assert (
        str(stopped.value)
        == f"stopped by {number.name} after step {step} of 10; the same command resumes"
    )
    assert stopped.value.code == (130 if number is SIGINT else 75)


def two_processes(work, folder: Path) -> list:
    """What work(rank) returned in each of two processes that know of each other."""
    arguments = (work, str(folder))
    # Forked: they need not import torch again.
    torch.multiprocessing.start_processes(one_of_two, arguments, nprocs=2, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def one_of_two(rank: int, work, folder: str) -> None:
    settings = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **settings)
    Path(folder, f"{rank}.json").write_text(json.dumps(work(rank)))
    dist.destroy_process_group()


def stopped_at(signals: list[dict], hurry: int = 0):
    """What a process says in the end whose training hears these signals, for each rank; one may be
    ahead.
    """

    def work(rank: int) -> str:
        def before_step(step: int) -> None:
            time.sleep(0.05 if rank == hurry else 0)
            dist.barrier()  # a step ends nowhere before it ended everywhere

        try:
            saves = train(
                SynchronizedStop(Stop()), ONE_OF_TWO, signals[rank], before_step=before_step
            )
            return f"finished, saved {saves}"
        except Stopped as stopped:
            return str(stopped)

    return work


@pytest.mark.parametrize("hurry", [0, 1])
@pytest.mark.parametrize(
    ("signals", "said"),
    [
        ([{}, {}], "finished, saved []"),
        ([{}, {3: SIGUSR1}], "stopped by SIGUSR1 after step 4 of 10"),
        ([{3: SIGUSR1}, {}], "stopped by SIGUSR1 after step 4 of 10"),
        ([{3: SIGTERM}, {3: SIGTERM}], "stopped by SIGTERM after step 4 of 10"),
        ([{3: SIGUSR1}, {3: SIGTERM}], "stopped by SIGTERM after step 4 of 10"),
        ([{3: SIGTERM}, {4: SIGTERM}], "stopped by SIGTERM after step 4 of 10"),
        ([{4: SIGTERM}, {}], "stopped by SIGTERM after step 5 of 10"),
        ([{}, {10: SIGTERM}], "finished, saved []"),
    ],
    ids=[
        "nobody",
        "the second",
        "the first",
        "both",
        "two signals",
        "one after the other",
        "epoch's end",
        "too late",
    ],
)
def test_two_processes_stop_after_the_same_step_whichever_got_the_signal(
    tmp_path, signals, said, hurry
):
    found = two_processes(stopped_at(signals, hurry), tmp_path)
    assert found[0] == found[1] and found[0].startswith(said)


# Waiting


def watched(patience: float) -> Watchdog:
    """A watchdog of rank 1 that speaks after `patience` seconds without a move."""
    watch = Watchdog()
    args = SimpleNamespace(world_size=2, ddp_timeout=3 * patience, process_index=1)
    watch.on_train_begin(args, TrainerState(), None)
    return watch


@pytest.fixture
def no_thread_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def wait_for_the_others(said: io.StringIO) -> str:
    """Stands still until the watchdog has said a line, which is returned."""
    while not said.getvalue().endswith("\n"):
        threading.Event().wait(0.01)
    line = said.getvalue()
    said.truncate(said.seek(0))
    return line


def test_a_process_that_is_stuck_says_where_once_and_again_when_it_is_stuck_again(
    no_thread_left, monkeypatch
):
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    watch = watched(patience=0.6)
    line = wait_for_the_others(said)
    place = f"rank 1 on {socket.gethostname()} has waited 1 s, "
    assert line.startswith(f"{place}before the first step, in ")
    assert "wait_for_the_others (test_callbacks.py:" in line
    assert "<- test_a_process_that_is_stuck" in line
    watch.on_step_end(ONE_OF_TWO, TrainerState(global_step=7), None)
    line = wait_for_the_others(said)
    assert line.startswith(f"{place}after step 7, in ")
    watch.on_train_end(ONE_OF_TWO, None, None)
    assert said.getvalue() == ""


@pytest.mark.parametrize("moves", ["on_step_end", "on_substep_end", "on_prediction_step"])
def test_a_process_that_moves_says_nothing(no_thread_left, capsys, moves):
    watch = Watchdog()
    asked = iter([True, True, True, False])

    def moved_in_time(patience: float) -> bool:
        """Moves as often as there are answers; the fourth time training ends."""
        if not next(asked):
            watch.on_train_end(ONE_OF_TWO, None, None)
        getattr(watch, moves)(ONE_OF_TWO, TrainerState(global_step=1), None)
        return watch.moved.is_set()

    watch.moved.wait = moved_in_time
    watch.watch(60, 1, threading.get_ident())
    assert next(asked, None) is None and capsys.readouterr().err == ""


def test_a_process_alone_waits_for_nobody():
    before = threading.active_count()
    Watchdog().on_train_begin(
        SimpleNamespace(world_size=1, ddp_timeout=1, process_index=0), TrainerState(), None
    )
    assert threading.active_count() == before
