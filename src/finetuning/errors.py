"""What the user got wrong, told in one line; how a script ends."""

import atexit
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from finetuning.launcher import silence_launcher

# How Python, Rust (safetensors) and C++ (torch.save) say that the disk is full, in exceptions of their own.
DISK_FULL = ("No space left on device", "Disk quota exceeded", "inline_container.cc")
# How torch says that of memory, of a GPU's and of the CPU's, and the C++ library.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command again goes on


class UserError(ValueError):
    """The recipe, the data or the machine does not allow what was asked for; the message is the whole explanation."""

    exit_code = 2


class TryAgain(UserError):
    """What may pass by itself, such as a Hub that does not answer: the same command may succeed later."""

    exit_code = 1


class Stopped(BaseException):
    """A signal asked the run to stop, and it did. Like KeyboardInterrupt, nothing that goes wrong."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.code = 130 if number == signal.SIGINT else REQUEUE


def run(main: Callable[[list[str]], None], manual: str, when_interrupted: str = "") -> None:
    """Calls main(arguments), or prints the manual; what the user can mend becomes one line on stderr, no traceback.

    Exits with 0, 2 after a UserError or without arguments, 1 where disk or memory is full or the Hub does not answer,
    130 after Ctrl-C, 75 where a signal asked for a stop and the same command will go on. A batch job reads it in the
    folder EXIT_CODES; see note_end.
    """
    code = 1  # of an exception that nobody foresaw
    # Registered before any library is imported, so called after all that they have registered.
    atexit.register(lambda: end_at_once(code))
    code = outcome(main, manual, when_interrupted)
    sys.exit(code)


def outcome(main: Callable[[list[str]], None], manual: str, when_interrupted: str) -> int:
    """The exit code, after everything that is to be said has been said; see run."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(manual.strip(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    note_end(1, "a process was killed", at=math.inf)  # what stands there if it is
    try:
        main(arguments)
        note_end(0)
        return 0
    except UserError as error:
        return tell(f"error: {one_line(error)}", error.exit_code)
    except KeyboardInterrupt:
        return tell(f"interrupted{when_interrupted}", 130)
    except Stopped as stopped:
        return tell(str(stopped) if is_first() else "", stopped.code)
    except PermissionError as error:
        return tell(f"error: {error.filename}: {error.strerror}; it has to be readable, and a folder writable", 2)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            return tell("", 1)  # as Python's manual and rich have it
        if is_out_of_memory(error):
            first = str(error).strip().partition("\n")[0]
            return tell(f"error: out of memory: {first}; src/preview.py says what a recipe needs", 1)
        if not any(words in str(error) for words in DISK_FULL):
            note_end(1, f"{type(error).__name__}: {one_line(error)}")
            raise
        return tell(f"error: the disk is full: {one_line(error)}; make room, and give the same command again", 1)


def end_at_once(code: int) -> None:
    """Ends a process of several, when Python is done with it and before Python takes itself apart.

    A thread of gloo lets go of the last tensors in its own time; if it needs the interpreter for that and only half of
    it is left, the process aborts (pytorch/pytorch#190489), which 2 in 5 do that end right after a collective.
    destroy_process_group waits for such threads only if nothing else has the group; DDP and DeepSpeed do.
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def reader_left() -> bool:
    """Whether nobody reads what is printed any more, as after `... | head`; what is left unprinted is dropped."""
    output = select.poll()
    output.register(sys.stdout, 0)
    has_left = any(event & select.POLLERR for _, event in output.poll(0))
    if has_left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return has_left


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def tell(line: str, code: int) -> int:
    """Says the line, if there is one, and returns the code to exit with."""
    is_noted = note_end(code, line)
    if is_first() or not line:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that dies of the same Ctrl-C is no other reason
    else:
        # What is wrong with a recipe is wrong in every process: the first speaks, and the launcher ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if line:
        print(line, file=sys.stderr, flush=True)
    silence_launcher()
    # Launchers report anything but 0 as a failure, a page for each node; a job that is only queued again has none.
    return 0 if is_noted and code == REQUEUE else code


def note_end(code: int, reason: str = "", at: float | None = None) -> bool:
    """Tells the batch job that started this process how it ends, and returns whether there is one to be told.

    Launchers turn every exit code into 1. So slurm/sft.sh names a folder in the environment variable EXIT_CODES, and
    each process leaves a file there of one line: code, time (s), reason.
    """
    folder = os.environ.get("EXIT_CODES")
    if not folder:
        return False
    try:
        line = f"{code} {at or time.time()} {reason}\n"
        Path(folder, os.environ.get("RANK", "0")).write_text(line, encoding="utf-8")
    except OSError:  # a full disk must not hide what happened
        return False
    return True
