"""What the user got wrong, told in one line."""

import os
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """The recipe, the data or the machine does not allow what was asked for; the message is the whole explanation."""


def run(main: Callable[[list[str]], None]) -> None:
    """Calls main(arguments); a UserError or Ctrl-C becomes one line on stderr and exit code 2 or 130, no traceback."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        leave(f"error: {' '.join(str(error).split())}", 2)
    except KeyboardInterrupt:
        leave("interrupted: nothing after the last checkpoint was kept", 130)
    except BrokenPipeError:  # `... | head`: the reader left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
