"""What happens beside the steps of training: metrics written down, and the place of a process that
waits.
"""

import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetuning.errors import UserError
from finetuning.evaluation.report import write_report
from finetuning.runs.metrics import append_metrics, write_metrics


class MetricsFile(TrainerCallback):
    """metrics.jsonl: what is logged. A resumed run first takes back what was logged after its
    checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_metrics(self.folder, state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_metrics(self.folder, state.log_history[-1])


class ReportFile(TrainerCallback):
    """report.html, at every checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with suppress(UserError):  # a damaged record is no reason to stop training
                write_report(self.folder)


class Watchdog(TrainerCallback):
    """Says on stderr where a process of several stands when it has not moved for a third of
    training.ddp_timeout.
    """

    def __init__(self) -> None:
        self.moved = threading.Event()
        self.ended = False
        self.place = "before the first step"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            thread = threading.get_ident()
            threading.Thread(
                target=self.watch,
                args=(args.ddp_timeout / 3, args.process_index, thread),
                daemon=True,
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
                shown = " <- ".join(
                    f"{call.name} ({Path(call.filename).name}:{call.lineno})"
                    for call in calls[:-7:-1]
                )
                where = f"rank {rank} on {socket.gethostname()}"
                print(
                    f"{where} has waited {patience:.0f} s, {self.place}, in {shown}",
                    file=sys.stderr,
                    flush=True,
                )
                self.moved.wait()
            self.moved.clear()
