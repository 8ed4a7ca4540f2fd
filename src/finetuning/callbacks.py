"""What happens beside the steps of training: metrics written down, stopping when asked, saying what is waited for."""

import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from finetuning.errors import Stopped
from finetuning.run_folder import append_metrics, write_metrics
from finetuning.stop import Stop


class MetricsFile(TrainerCallback):
    """metrics.jsonl: what is logged. A run that goes on first takes back what was logged after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_metrics(self.folder, state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_metrics(self.folder, state.log_history[-1])


class StopTogether(TrainerCallback):
    """Where a process is asked to stop: one checkpoint, after a step that all processes agree on, then Stopped.

    The question goes round while the next step is computed, over a group of its own on the CPU, and is answered at that
    step's end: nobody waits for it, and no device is asked.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self.group: Any = None
        self.question: tuple[Any, torch.Tensor] | None = None
        self.number = 0  # of the signal that was agreed on
        self.in_training = False
        self.saved = 0  # the step of the last checkpoint
        self.ends_epoch = False
        """the step that was the last of its epoch is over, what comes with the epoch's end is not"""
        self.postponed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_training, self.saved = True, state.global_step
        if args.world_size > 1:
            self.group = dist.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number = self.number or self.agreed()
        control.should_save |= bool(self.number)
        # What comes with the end of an epoch, logs and an evaluation, belongs into the checkpoint of its last step.
        self.ends_epoch = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if self.ends_epoch:
            self.postponed, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.postponed
        self.postponed = self.ends_epoch = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation may take longer than a scheduler waits. It is cut short where its step is, or can be, saved."""
        if self.stop.phase == "training" and not self.ends_epoch:
            self.number = self.number or self.agreed()
            if self.number and (self.in_training or self.saved == state.global_step):
                self.end(state)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.number = self.number or self.hear_out()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step
        if self.number:
            self.end(state)

    def end(self, state: Any) -> None:
        self.hear_out()
        number = signal.Signals(self.number)
        place = f"step {state.global_step} of {state.max_steps}"
        raise Stopped(number, f"stopped by {number.name} after {place}; the same command goes on")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.in_training = False
        self.number = self.number or self.hear_out()

    def agreed(self) -> int:
        """The highest signal number that any process had heard a step ago; at once where there is only one process."""
        heard = int(self.stop.asked or 0)
        if self.group is None:
            return heard
        answer = self.hear_out()
        flag = torch.tensor([heard])
        self.question = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return answer

    def hear_out(self) -> int:
        if self.question is None:
            return 0
        work, flag = self.question
        work.wait()
        self.question = None
        return int(flag)


class Watch(TrainerCallback):
    """Says on stderr where a process of several stands when it has not moved for a third of training.ddp_timeout."""

    def __init__(self) -> None:
        self.moved = threading.Event()
        self.ended = False
        self.place = "before the first step"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            thread = threading.get_ident()
            threading.Thread(
                target=self.watch, args=(args.ddp_timeout / 3, args.process_index, thread), daemon=True
            ).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.place = f"after step {state.global_step}"
        self.moved.set()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.moved.set()

    on_prediction_step = on_substep_end

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended = True
        self.moved.set()

    def watch(self, patience: float, rank: int, thread: int) -> None:
        while not self.ended:
            if not self.moved.wait(patience):
                calls = traceback.extract_stack(sys._current_frames()[thread])
                shown = " <- ".join(f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in calls[:-7:-1])
                where = f"rank {rank} on {socket.gethostname()}"
                print(f"{where} has waited {patience:.0f} s, {self.place}, in {shown}", file=sys.stderr, flush=True)
                self.moved.wait()
            self.moved.clear()
