"""How a script ends: its exit code, and the note that it leaves for the batch job."""

import os
import subprocess
import sys

import pytest
from commands import ROOT

# A script that is finished, and then meets a signal while Python takes itself apart.
LATE = """
import atexit, os, signal, sys
sys.path.insert(0, "src")
from finetuning.script import run

def main(arguments):
    atexit.register(lambda: os.kill(os.getpid(), getattr(signal, arguments[0])))

run(main, "")
"""
FAILS = """
import sys
sys.path.insert(0, "src")
from finetuning.errors import UserError
from finetuning.script import run

def main(arguments):
    raise UserError("wrong")

run(main, "")
"""


def run_source(source, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_what_is_finished_stays_so_whatever_signal_comes_late(name, tmp_path):
    done = run_source(LATE, name, EXIT_CODES=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (note,) = tmp_path.iterdir()
    assert note.read_text().split()[0] == "0"


def test_processes_of_the_same_rank_leave_a_note_each(tmp_path):
    """Two nodes whose processes were started alone are both number 0."""
    for source, argument in ((LATE, "SIGUSR1"), (FAILS, "x")):
        run_source(source, argument, EXIT_CODES=str(tmp_path), RANK="0")
    assert sorted(note.read_text().split()[0] for note in tmp_path.iterdir()) == ["0", "2"]
