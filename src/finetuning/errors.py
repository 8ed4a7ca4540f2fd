"""What the user got wrong, told in one line."""

import os
import signal
import sys
from collections.abc import Callable

# How Python, Rust (safetensors) and C++ (torch.save) say that the disk is full, in exceptions of their own.
DISK_FULL = ("No space left on device", "inline_container.cc")


class UserError(ValueError):
    """The recipe, the data or the machine does not allow what was asked for; the message is the whole explanation."""


def run(main: Callable[[list[str]], None], manual: str, when_interrupted: str = "") -> None:
    """Calls main(arguments), or prints the manual; what the user can mend becomes one line on stderr, no traceback.

    Exit code 2 after a UserError or without arguments, 1 where the disk is full, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(manual.strip(), file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    try:
        main(arguments)
    except UserError as error:
        leave(f"error: {one_line(error)}", 2)
    except KeyboardInterrupt:
        leave(f"interrupted{when_interrupted}", 130)
    except BrokenPipeError:  # `... | head`: the reader left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not any(words in str(error) for words in DISK_FULL):
            raise
        leave(f"error: the disk is full: {one_line(error)}; make room, and give the same command again", 1)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def leave(line: str, code: int) -> None:
    print(line, file=sys.stderr, flush=True)
    silence_launcher()
    sys.exit(code)


def silence_launcher() -> None:
    """Ends a one-process `accelerate launch` that waits for us.

    It answers every exit code but 0 with a traceback of its own (accelerate/commands/launch.py, simple_launcher), in
    which our one line would drown. Launchers of several processes are left alone: they end the other ranks.
    """
    import psutil  # a dependency of accelerate

    parent = psutil.Process().parent()
    if parent is None or "WORLD_SIZE" in os.environ:
        return
    command = parent.cmdline()
    if "launch" in command and any(os.path.basename(part) == "accelerate" for part in command):
        parent.send_signal(signal.SIGTERM)
