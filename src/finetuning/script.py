"""How a script starts and ends: one line on stderr, an exit code, a note for the batch job."""

import atexit
import errno
import gc
import io
import logging
import math
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from finetuning.errors import DISK_FULL, REQUEUE, Stopped, UserError, is_out_of_memory, one_line
from finetuning.launch.launcher import silence_launcher
from finetuning.untrusted_text import printable


def run(main: Callable[[list[str]], None], manual: str, when_interrupted: str = "") -> None:
    """Calls main(arguments), or prints the manual; what the user can mend becomes one line on
    stderr, no traceback.

    Exits with 0, 2 after a UserError or without arguments, 1 where disk or memory is full or the
    Hub does not answer, 130 after Ctrl-C, 75 where a signal stopped it and the same command will
    resume. A batch job reads it in the folder EXIT_CODES; see write_exit_note.
    """
    use_utf8()
    sys.stdout, sys.stderr = map(outliving_terminal, (sys.stdout, sys.stderr))
    code = 1  # of an exception that nobody foresaw
    # Registered before any library is imported, so called after all that they have registered.
    atexit.register(lambda: exit_without_finalizers(code))
    sys.excepthook = print_traceback
    code = run_main(main, manual, when_interrupted)
    sys.exit(code)


@contextmanager
def uncollected() -> Iterator[None]:
    """For the first import of torch and transformers, which make two million objects that stay.

    Looking for garbage among them took 2 of 11 CPU seconds, and would take more whenever it is
    looked for later.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def run_main(main: Callable[[list[str]], None], manual: str, when_interrupted: str) -> int:
    """The exit code, after everything that is to be said has been said; see run."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(manual.strip(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if "--verbose" not in arguments:
        silence_libraries()
    write_exit_note(1, "a process was killed", at=math.inf)  # what stands there if it is
    try:
        main(arguments)
        ignore_signals()
        write_exit_note(0)
        return 0
    except (KeyboardInterrupt, Stopped, Exception) as error:
        known = line_and_code(error, when_interrupted)
        if known is None:
            write_exit_note(1, safe(f"{type(error).__name__}: {one_line(error)}"))
            raise
    return report(*known)


def line_and_code(error: BaseException, when_interrupted: str) -> tuple[str, int] | None:
    """(line for the person, exit code); None for an exception that nobody foresaw."""
    if isinstance(error, UserError):
        return f"error: {one_line(error)}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{when_interrupted}", 130
    if isinstance(error, Stopped):
        return str(error) if is_first() else "", error.code
    if line := refused_file(error):
        return line, 2
    if is_of_interrupt(error):
        return f"interrupted{when_interrupted}", 130
    if isinstance(error, BrokenPipeError) and stdout_closed():
        return "", 1  # as Python's manual and rich have it
    if line := out_of_room(error):
        return line, 1
    return None


def refused_file(error: BaseException) -> str | None:
    """Of a file that may not be used, or is none."""
    if isinstance(error, PermissionError):
        what = f"{error.filename}: {error.strerror}"
        return f"error: {what}; it has to be readable, and a folder writable"
    if isinstance(error, IsADirectoryError):
        name = error.filename2 or error.filename
        return f"error: {name} is a folder where a file belongs; move it away"
    return None


def out_of_room(error: BaseException) -> str | None:
    """Of memory or a disk that is full."""
    if is_out_of_memory(error):
        first = str(error).strip().partition("\n")[0]
        return f"error: out of memory: {first}; src/preview.py says what a recipe needs"
    if any(text in str(error) for text in DISK_FULL):
        remedy = "make room, and give the same command again"
        return f"error: the disk is full: {one_line(error)}; {remedy}"
    return None


def use_utf8() -> None:
    """Starts anew where the locale says ASCII and Python believes it: Japanese arguments and the
    names of files could not be read, nor answers printed.
    """
    if sys.getfilesystemencoding() == "ascii":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


class Terminal(io.FileIO):
    """A terminal that may be closed while the script runs; what is then printed is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def outliving_terminal(stream: Any) -> Any:
    """The stream itself where it is no terminal."""
    if stream is None or not stream.isatty():
        return stream
    raw = Terminal(stream.fileno(), "w", closefd=False)
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


def is_of_interrupt(error: BaseException | None) -> bool:
    """Whether a library made something else of Ctrl-C, as some do while they are imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def ignore_signals() -> None:
    """What has ended stays as it was noted: Python would die of a signal while it takes itself
    apart, and launchers that die of the same Ctrl-C have the kernel send SIGTERM.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def silence_libraries() -> None:
    """What they log and warn of is for their programmers; errors are still shown."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def exit_without_finalizers(code: int) -> None:
    """Ends a process of several, when Python is done with it and before Python takes itself apart.

    A thread of gloo lets go of the last tensors in its own time; if it needs the interpreter for
    that and only half of it is left, the process aborts (pytorch/pytorch#190489), which 2 in 5 do
    that end right after a collective. destroy_process_group waits for such threads only if nothing
    else has the group; DDP and DeepSpeed do.
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stdout_closed() -> bool:
    """Whether nobody reads what is printed any more, as after `... | head`; what is left unprinted
    is dropped.
    """
    output = select.poll()
    output.register(sys.stdout, 0)
    has_left = any(event & select.POLLERR for _, event in output.poll(0))
    if has_left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return has_left


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def report(line: str, code: int) -> int:
    """Says the line, if there is one, and returns the code to exit with."""
    line = safe(line)
    is_noted = write_exit_note(code, line)
    if is_first() or not line:
        ignore_signals()
    else:
        # What is wrong with a recipe is wrong in every process: the first speaks, and the launcher
        # ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if line:
        print(line, file=sys.stderr, flush=True)
    silence_launcher()
    # Launchers report anything but 0 as a failure, a page for each node; a job that is only queued
    # again has none.
    return 0 if is_noted and code == REQUEUE else code


def safe(text: str) -> str:
    """The text without control characters and secrets: it is printed, and kept in the job's log."""
    if not text:
        return text
    from finetuning.secrets import redacted

    return redacted(printable(text))


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Python's own, but for what its message may hold of others."""
    print(safe("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def write_exit_note(code: int, reason: str = "", at: float | None = None) -> bool:
    """Tells the batch job that started this process how it ends, and returns whether there is one
    to be told.

    Launchers turn every exit code into 1. So slurm/sft.sh names a folder in the environment
    variable EXIT_CODES, and each process leaves a file there of one line: code, time (s), reason.
    """
    folder = os.environ.get("EXIT_CODES")
    if not folder:
        return False
    try:
        line = f"{code} {at or time.time()} {reason}\n"
        # By node and process: two nodes whose processes were started alone are both number 0.
        Path(folder, f"{socket.gethostname()}-{os.getpid()}").write_text(line, encoding="utf-8")
    except OSError:  # a full disk must not hide what happened
        return False
    return True
