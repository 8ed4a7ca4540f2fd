"""The process that started this one: `accelerate launch`, torchrun, or neither."""

import argparse
import ctypes
import os
import signal
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1  # prctl(2)


LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
}


def find_launcher() -> psutil.Process | None:
    parent = psutil.Process().parent()
    is_launcher = parent is not None and LAUNCHERS & {
        Path(part).name for part in parent.cmdline()[:3]
    }
    return parent if is_launcher else None


def end_with_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher dies, lest its processes train on unseen.

    One-process `accelerate launch` passes no signal on, and SIGUSR1 kills torch's launcher, not its processes.
    """
    if find_launcher():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def silence_launcher() -> None:
    """Ends a one-process `accelerate launch` that waits for us.

    It answers every exit code but 0 with a traceback of its own (accelerate/commands/launch.py, simple_launcher), in
    which our one line would drown. Launchers of several processes are left alone: they end the other ranks.
    """
    if "WORLD_SIZE" not in os.environ and (launcher := find_launcher()):
        launcher.send_signal(signal.SIGTERM)


def launch_arguments() -> argparse.Namespace | None:
    """Those of the `accelerate launch` that started this process; None where something else did."""
    launcher = find_launcher()
    words = launcher.cmdline() if launcher else []
    start = next((n for n, word in enumerate(words, start=1) if word.endswith("launch")), None)
    if start is None:
        return None
    from accelerate.commands.launch import launch_command_parser

    arguments: argparse.Namespace
    arguments, _ = launch_command_parser().parse_known_args(words[start:])
    return arguments


def names_config() -> bool:
    """Whether this process was started with an accelerate config of the user's choice."""
    arguments = launch_arguments()
    return arguments is not None and arguments.config_file is not None


def requested_processes() -> int:
    """How many processes were asked for: of torch's launcher, or by flag or config file of
    `accelerate launch`.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    arguments = launch_arguments()
    if arguments is None:
        return 1
    if arguments.num_processes:
        return int(arguments.num_processes)
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if arguments.config_file is None and (arguments.cpu or not Path(default_config_file).is_file()):
        return 1
    return load_config_from_file(arguments.config_file).num_processes or 1
