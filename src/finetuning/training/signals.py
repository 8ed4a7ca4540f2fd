"""A run that is asked to stop: by its scheduler, by a terminal that closes, or by Ctrl-C.

before training   nothing to save: it ends at once
in training       the processes agree on a step, save, and end with 75 (the same command resumes),
                  or 130 after Ctrl-C
after training    signals other than Ctrl-C do not keep the last seconds from being saved
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetuning.errors import Stopped
from finetuning.launch.launcher import end_with_launcher, silence_launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Stop:
    """Handles the signals; `signal` is the one that came, or None."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.phase = "before"

    def listen(self) -> None:
        for number in SIGNALS:
            # nohup has a terminal that closes ignored; so does a shell, of what it starts.
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self.on_signal)
        end_with_launcher()

    @contextmanager
    def after_a_step(self) -> Iterator[None]:
        """Within, a signal is only noted: the trainer looks at the end of each step. A second
        Ctrl-C is obeyed.
        """
        self.phase = "training"
        try:
            yield
        finally:
            self.phase = "after"

    def on_signal(self, number: int, frame: Any) -> None:
        repeated = self.signal == number
        # A launcher that dies of Ctrl-C too has the kernel send SIGTERM.
        if self.signal != signal.SIGINT:
            self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            silence_launcher()
        if number == signal.SIGINT and (self.phase != "training" or repeated):
            raise KeyboardInterrupt
        if self.phase == "before":
            raise Stopped(
                self.signal, f"stopped by {self.signal.name} before the first step; nothing to save"
            )


@contextmanager
def block_signals() -> Iterator[None]:
    """Within, signals wait; a process that is started here inherits the mask, until it knows what
    to do about them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_ignores_signals(worker: int) -> None:
    """To be called in a process that loads batches (DataLoader's worker_init_fn): only its parent
    may end it.

    A scheduler signals every process of a job. torch's workers die of SIGTERM, and the one that
    trains dies of that, before it could save.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=exit_on_parent_signal, daemon=True).start()


def exit_on_parent_signal() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)
