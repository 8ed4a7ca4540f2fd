"""What the user got wrong, told in one line."""

import difflib
import signal
from collections.abc import Iterable

# How Python, Rust (safetensors) and C++ (torch.save) say that the disk is full, in exceptions of
# their own.
DISK_FULL = ("No space left on device", "Disk quota exceeded", "inline_container.cc")


# How torch says that of memory, of a GPU's and of the CPU's, and the C++ library.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")


REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command again resumes


class UserError(ValueError):
    """The recipe, the data or the machine does not allow what was asked for; the message is the
    whole explanation.
    """

    exit_code = 2


class TryAgain(UserError):
    """What may pass by itself, such as a Hub that does not answer: the same command may succeed
    later.
    """

    exit_code = 1


class Stopped(BaseException):
    """A signal asked the run to stop, and it did. Like KeyboardInterrupt, nothing that goes wrong."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.code = 130 if number == signal.SIGINT else REQUEUE


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def did_you_mean(name: object, choices: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: `; did you mean x?`, or nothing if none is near."""
    near = nearest(name, choices)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def nearest(
    name: object, choices: Iterable[str], count: int = 1, similarity: float = 0.6
) -> list[str]:
    """The choices that are spelt most like the name, the nearest first."""
    return difflib.get_close_matches(str(name), list(choices), n=count, cutoff=similarity)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
