"""A run that is asked to stop, by its scheduler or by Ctrl-C.

before training   nothing to save: it ends at once
in training       the processes agree on a step, save, and end with 75 (the same command goes on), or 130 after Ctrl-C
after training    SIGTERM and SIGUSR1 do not keep the last seconds from being saved
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetuning.errors import Stopped
from finetuning.launcher import end_with_launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Hears the signals; `asked` is the one that came, or None."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.phase = "before"

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self.hear)
        end_with_launcher()

    @contextmanager
    def after_a_step(self) -> Iterator[None]:
        """Within, a signal is only noted: whoever trains looks at the end of each step. A second Ctrl-C is obeyed."""
        self.phase = "training"
        try:
            yield
        finally:
            self.phase = "after"

    def hear(self, number: int, frame: Any) -> None:
        repeated = self.asked == number
        if self.asked != signal.SIGINT:  # a launcher that dies of Ctrl-C too has the kernel send SIGTERM
            self.asked = signal.Signals(number)
        if number == signal.SIGINT and (self.phase != "training" or repeated):
            raise KeyboardInterrupt
        if self.phase == "before":
            raise Stopped(self.asked, f"stopped by {self.asked.name} before the first step; nothing to save")


@contextmanager
def deaf() -> Iterator[None]:
    """Within, signals wait; a process that is started is born deaf, before it knows what to do about them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_only_the_trainer(worker: int) -> None:
    """To be called in a process that loads batches (DataLoader's worker_init_fn): only its parent may end it.

    A scheduler signals every process of a job. torch's workers die of SIGTERM, and the one that trains dies of that,
    before it could save.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=end_with_the_trainer, daemon=True).start()


def end_with_the_trainer() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)
