"""The process that started this one: `accelerate launch`, torchrun, or neither."""

import argparse
import ctypes
import os
import signal
from pathlib import Path

import psutil

from finetuning.errors import UserError

PR_SET_PDEATHSIG = 1  # prctl(2)


LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
}


def find_launcher() -> psutil.Process | None:
    """Of this process; None where it has none, or one that has ended or may not be looked at."""
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline()[:3] if parent else []
    except psutil.Error:
        return None
    return parent if LAUNCHERS & {Path(part).name for part in command} else None


def end_with_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher dies: its processes would train on unseen.

    One-process `accelerate launch` passes no signal on, and SIGUSR1 kills torch's launcher, not its
    processes.
    """
    if find_launcher():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def silence_launcher() -> None:
    """Ends a one-process `accelerate launch` that waits for us.

    It answers every exit code but 0 with a traceback of its own (accelerate/commands/launch.py,
    simple_launcher), in which our one line would drown. Launchers of several processes are left
    alone: they end the other ranks.
    """
    if "WORLD_SIZE" not in os.environ and (launcher := find_launcher()):
        launcher.send_signal(signal.SIGTERM)


def launch_arguments() -> argparse.Namespace | None:
    """Those of the `accelerate launch` that started this process; None where something else did."""
    launcher = find_launcher()
    command = launcher.cmdline() if launcher else []
    start = next((n for n, part in enumerate(command, start=1) if part.endswith("launch")), None)
    if start is None:
        return None
    from accelerate.commands.launch import launch_command_parser

    arguments: argparse.Namespace
    arguments, _ = launch_command_parser().parse_known_args(command[start:])
    return arguments


def names_config() -> bool:
    """Whether this process was started with an accelerate config of the user's choice."""
    arguments = launch_arguments()
    return arguments is not None and arguments.config_file is not None


def requested_processes() -> int:
    """How many processes were asked for: of torch's launcher, or by flag or config file of
    `accelerate launch`.
    """
    if count := os.environ.get("WORLD_SIZE"):
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f"WORLD_SIZE: expected a whole number, at least 1, found {count!r}")
        return int(count)
    arguments = launch_arguments()
    if arguments is None:
        return 1
    if arguments.num_processes:
        return int(arguments.num_processes)
    file = config_file(arguments)
    if file is None or (arguments.config_file is None and arguments.cpu):
        return 1
    from accelerate.commands.config.config_args import load_config_from_file

    return load_config_from_file(arguments.config_file).num_processes or 1


def config_file(arguments: argparse.Namespace) -> str | None:
    """The file that `accelerate launch` read: the one named, else its own default, if there is
    one."""
    from accelerate.commands.config.config_args import default_config_file

    default = default_config_file if Path(default_config_file).is_file() else None
    return arguments.config_file or default


def leave_precision_to_recipe() -> str | None:
    """Forgets the mixed_precision of `accelerate launch`; returns the line that says so if it was
    asked for.

    `accelerate config` writes one into accelerate's own default file, which every later launch
    reads unseen.
    """
    asked = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    if asked == "no":
        return None
    arguments = launch_arguments()
    file = config_file(arguments) if arguments else None
    return (
        f"{file or 'accelerate'}: mixed_precision: {asked} is not used; training.bf16 and "
        "training.fp16 of the recipe decide"
    )
