"""What a person can cause, told in one line, and the exit codes that batch systems read."""

import difflib
import signal
from collections.abc import Iterable

from finetuning.untrusted_text import printable

# How Python, Rust (safetensors) and C++ (torch.save) report a full disk, each by its own exception.
DISK_FULL = ("No space left on device", "Disk quota exceeded", "inline_container.cc")
# How torch, for GPU and CPU memory, cuBLAS and cuDNN, and the C++ library report an allocation that
# failed.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: unfinished; the same command resumes


class UserError(ValueError):
    """The recipe, the data or the machine does not allow what was requested.

    The message is the whole explanation, in one line; scripts print it without a traceback.
    """

    exit_code = 2


class TryAgain(UserError):
    """A failure that may pass, such as a Hub that is down: the same command may succeed later."""

    exit_code = 1


class Stopped(BaseException):
    """A signal asked the run to stop, and it did. Not an error, like KeyboardInterrupt."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.code = 130 if number == signal.SIGINT else REQUEUE


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(part in str(error) for part in OUT_OF_MEMORY)


def did_you_mean(name: object, choices: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: `; did you mean x?`, or nothing."""
    near = nearest(name, choices)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def nearest(
    name: object, choices: Iterable[str], count: int = 1, similarity: float = 0.6
) -> list[str]:
    """The choices that are spelt most like the name, the nearest first."""
    return difflib.get_close_matches(str(name), list(choices), n=count, cutoff=similarity)


def one_line(error: BaseException) -> str:
    """Its message without line feeds, printable: names and answers of others stand in it."""
    return printable(" ".join(str(error).split()))
