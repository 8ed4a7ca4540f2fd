"""What the user got wrong, told in one line; how a script ends."""

import os
import signal
import sys
import time
from collections.abc import Callable

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

    Exit code 2 after a UserError or without arguments, 1 where disk or memory is full or the Hub does not answer, 130
    after Ctrl-C, 75 where a signal asked for a stop and the same command will go on. The code is also written to the
    file that the environment variable EXIT_CODE_FILE names: launchers turn every code into 1.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(manual.strip(), file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    try:
        main(arguments)
    except UserError as error:
        leave(f"error: {one_line(error)}", error.exit_code)
    except KeyboardInterrupt:
        leave(f"interrupted{when_interrupted}", 130)
    except Stopped as stopped:
        leave(str(stopped) if is_first() else "", stopped.code)
    except BrokenPipeError:  # `... | head`: the reader left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except PermissionError as error:
        leave(f"error: {error.filename}: {error.strerror}; it has to be readable, and a folder writable", 2)
    except Exception as error:
        if is_out_of_memory(error):
            first = str(error).strip().partition("\n")[0]
            leave(f"error: out of memory: {first}; src/preview.py says what a recipe needs", 1)
        if not any(words in str(error) for words in DISK_FULL):
            raise
        leave(f"error: the disk is full: {one_line(error)}; make room, and give the same command again", 1)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def leave(line: str, code: int) -> None:
    """Says the line, if there is one, and exits."""
    if is_first() or not line:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that dies of the same Ctrl-C is no other reason
    else:
        # What is wrong with a recipe is wrong in every process: the first speaks, and the launcher ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if file := os.environ.get("EXIT_CODE_FILE"):
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(f"{code}\n")
    if line:
        print(line, file=sys.stderr, flush=True)
    silence_launcher()
    sys.exit(code)
