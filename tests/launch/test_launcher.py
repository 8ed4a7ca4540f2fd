"""Who started this process is found out from the process table, not from what it says of itself."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from accelerate.commands.config import config_args
from conftest import ROOT

from finetuning.errors import UserError
from finetuning.launch import launcher
from finetuning.launch.launcher import (
    find_launcher,
    leave_precision_to_recipe,
    requested_processes,
)

SAYS = """
import json, os, sys
sys.path.insert(0, "src")
from finetuning.launch.launcher import requested_processes, find_launcher
found = find_launcher()
said = {"asked": requested_processes(), "launcher": found and found.pid, "parent": os.getppid()}
print(json.dumps(said))
"""

# A launcher is known by its name; this one starts a script, says its number and waits.
LAUNCHER = """
import subprocess, sys
print(subprocess.Popen([sys.executable, *sys.argv[1:]]).pid, flush=True)
input()
"""

WAITS_FOR_SIGTERM = """
import sys, time
sys.path.insert(0, "src")
from finetuning.training.signals import Stop
stop = Stop()
stop.listen()
with stop.after_a_step():
    print("ready", flush=True)
    while stop.signal is None:
        time.sleep(0.01)
print(stop.signal.name, flush=True)
"""


@pytest.fixture
def script(tmp_path):
    """A function that writes a script and returns its path."""

    def write(text: str, name: str = "script.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def started_by(monkeypatch):
    """A function that has the launcher be one of this command line, with this default config file
    of accelerate."""
    monkeypatch.chdir(ROOT)

    def start(command: str, default_config: str = "/nowhere/default_config.yaml") -> None:
        process = SimpleNamespace(cmdline=command.split)
        monkeypatch.setattr(launcher, "find_launcher", lambda: process)
        monkeypatch.setattr(config_args, "default_config_file", default_config)

    return start


def test_nobody_launched_the_tests():
    assert find_launcher() is None
    assert requested_processes() == 1


@pytest.mark.parametrize("found", [psutil.ZombieProcess, psutil.AccessDenied])
def test_a_parent_that_has_ended_or_is_hidden_is_no_launcher(monkeypatch, found):
    def cmdline(process):
        raise found(process.pid)

    monkeypatch.setattr(psutil.Process, "cmdline", cmdline)
    assert find_launcher() is None


def test_torch_s_launcher_says_how_many_there_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert requested_processes() == 6


@pytest.mark.parametrize("count", ["x", "0", "-1", "2.5"])
def test_a_launcher_that_says_no_number_is_told_so(monkeypatch, count):
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UserError, match=f"WORLD_SIZE: expected a whole number, .* '{count}'"):
        requested_processes()


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("python /bin/accelerate launch src/sft.py recipe.yaml", 1),
        ("python /bin/accelerate launch --cpu --num_processes 2 src/sft.py recipe.yaml", 2),
        ("python /bin/accelerate launch --cpu --num-processes=3 src/sft.py recipe.yaml", 3),
        ("python /bin/accelerate launch --cpu src/sft.py --num_processes 9", 1),
        (
            "python /bin/accelerate launch --config_file accelerate_configs/cpu.yaml src/sft.py "
            "recipe.yaml",
            1,
        ),
        (
            "python /bin/accelerate launch --config_file accelerate_configs/cpu_ddp.yaml "
            "src/sft.py recipe.yaml",
            2,
        ),
        (
            "python /bin/accelerate launch --config_file accelerate_configs/cpu.yaml "
            "--num_processes 4 src/sft.py r",
            4,
        ),
        ("python /bin/accelerate-launch --cpu --num_processes 2 src/sft.py recipe.yaml", 2),
        ("python /opt/launch/accelerate launch --cpu --num_processes 2 src/sft.py recipe.yaml", 2),
        ("python -m accelerate.commands.launch --cpu --num_processes 2 src/sft.py recipe.yaml", 2),
    ],
)
def test_flags_and_config_of_accelerate_say_how_many_were_asked_for(started_by, command, processes):
    started_by(command)
    assert requested_processes() == processes


def test_accelerate_s_default_config_counts_unless_the_cpu_was_requested(started_by, tmp_path):
    """So accelerate does it: --cpu leaves its default config alone."""
    config = tmp_path / "default_config.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\n")
    started_by("python /bin/accelerate launch src/sft.py recipe.yaml", str(config))
    assert requested_processes() == 8
    started_by("python /bin/accelerate launch --cpu src/sft.py recipe.yaml", str(config))
    assert requested_processes() == 1


@pytest.mark.usefixtures("warm_python")
def test_accelerate_starts_one_process_where_two_were_asked_for_and_we_know(script):
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "--cpu", "--num_processes", "2", script(SAYS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (said,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert said["asked"] == 2
    assert said["launcher"] == said["parent"]


@pytest.mark.parametrize("name", ["accelerate", "accelerate-launch", "torchrun"])
def test_a_script_gets_a_signal_when_its_launcher_ends(script, name):
    command = [sys.executable, script(LAUNCHER, name), script(WAITS_FOR_SIGTERM)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGKILL)
        try:
            assert process.stdout.readline() == "SIGTERM\n"
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise


def test_mixed_precision_of_accelerate_s_own_config_is_not_used_and_its_file_is_named(
    started_by, tmp_path, monkeypatch
):
    """Whoever has run `accelerate config` has it there, and gave no file."""
    config = tmp_path / "default_config.yaml"
    config.write_text("mixed_precision: fp16\n")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    started_by("python /bin/accelerate launch src/sft.py recipe.yaml", str(config))
    said = leave_precision_to_recipe()
    assert said.startswith(f"{config}: mixed_precision: fp16 is not used; training.bf16 ")
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


def test_a_precision_that_was_not_requested_is_not_mentioned(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert leave_precision_to_recipe() is None
