"""A signal ends a run at once, after a step, or not at all; the exit code says what to do."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1

import pytest
from conftest import ROOT

from finetuning.errors import Stopped
from finetuning.training.signals import SIGNALS, Stop


@pytest.fixture
def stop() -> Stop:
    """One that listens; conftest gives the signals back."""
    signal.signal(SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    stop = Stop()
    stop.listen()
    return stop


# Phases


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1])
def test_before_training_a_signal_ends_the_run_at_once(stop, number):
    with pytest.raises(
        Stopped, match=f"stopped by {number.name} before the first step; nothing to save"
    ) as stopped:
        signal.raise_signal(number)
    assert stopped.value.code == 75
    assert not isinstance(stopped.value, Exception), (
        "a library's `except Exception` would swallow it"
    )


def test_before_training_ctrl_c_is_obeyed(stop):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_in_training_a_signal_is_only_noted(stop, number):
    assert stop.signal is None
    with stop.after_a_step():
        signal.raise_signal(number)
        assert stop.signal is number


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1])
def test_in_training_a_scheduler_may_ask_twice(stop, number):
    with stop.after_a_step():
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.signal is number


@pytest.mark.parametrize("between", [[], [SIGTERM]])
def test_a_second_ctrl_c_is_obeyed_in_training_too(stop, between):
    with stop.after_a_step():
        for number in (SIGINT, *between):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(SIGINT)


def test_ctrl_c_stays_the_signal_when_the_launcher_dies_of_it_too(stop):
    """One-process accelerate launch ends a moment after its script was interrupted; the kernel then
    sends SIGTERM.
    """
    with stop.after_a_step():
        signal.raise_signal(SIGINT)
        signal.raise_signal(SIGTERM)
        assert stop.signal is SIGINT


def test_ctrl_c_after_a_scheduler_asked_is_no_second_ctrl_c(stop):
    with stop.after_a_step():
        signal.raise_signal(SIGTERM)
        signal.raise_signal(SIGINT)
        assert stop.signal is SIGINT


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1])
def test_after_training_a_scheduler_does_not_keep_the_last_seconds_from_being_saved(stop, number):
    with stop.after_a_step():
        pass
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(SIGINT)


def test_training_that_ends_in_an_error_is_over_too(stop):
    with pytest.raises(OSError, match="disk"), stop.after_a_step():
        raise OSError("disk")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(SIGINT)


@pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), (SIGTERM, 75), (SIGUSR1, 75)])
def test_only_ctrl_c_does_not_ask_to_be_requeued(number, code):
    assert Stopped(number, "stopped").code == code


# How a script ends

INTERRUPTED = "interrupted; the same command resumes\n"

SCRIPT = """
import signal, sys
sys.path.insert(0, "src")
from finetuning.errors import Stopped, UserError
from finetuning.script import run

def main(arguments):
    exec(arguments[0], {**globals(), "arguments": arguments})

run(main, "the manual", when_interrupted="; the same command resumes")
"""


@pytest.fixture
def ending(tmp_path):
    """A function that runs a script with this main: (exit code, stderr, [code, reason] that it left
    in EXIT_CODES).
    """

    def end(
        main: str,
        rank: str = "0",
        stop_after: float | None = None,
        folder: Path = tmp_path,
        **more: str,
    ):
        environment = {**os.environ, "EXIT_CODES": str(folder), "RANK": rank, **more}
        command = [sys.executable, "-c", SCRIPT, main]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            if stop_after:
                process.stdout.readline()
                time.sleep(stop_after)
                assert process.poll() is None
                process.terminate()
            stderr = process.communicate(timeout=60)[1]
        file = folder / f"{socket.gethostname()}-{process.pid}"
        left = file.read_text().rstrip("\n").split(" ", 2) if file.exists() else ["", "", ""]
        return process.returncode, stderr, [left[0], left[2]]

    return end


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (
            "raise UserError('data.path: a.jsonl\\n  is not there')",
            2,
            "error: data.path: a.jsonl is not there",
        ),
        ("raise KeyboardInterrupt", 130, "interrupted; the same command resumes"),
        ("raise Stopped(signal.SIGINT, 'stopped by SIGINT')", 130, "stopped by SIGINT"),
        (
            "raise OSError(28, 'No space left on device')",
            1,
            "error: the disk is full: [Errno 28] No space left on device; make room, and give the "
            "same command again",
        ),
    ],
    ids=["mistake", "interrupted", "SIGINT", "full disk"],
)
def test_a_script_ends_with_one_line_which_it_leaves_to_its_batch_job_too(ending, main, code, line):
    assert ending(main) == (code, f"{line}\n", [str(code), line])


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_one_that_is_to_be_resumed_tells_75_to_its_batch_job_and_then_0_to_its_launcher(
    ending, number, tmp_path
):
    stop = f"raise Stopped(signal.{number}, 'stopped')"
    assert ending(stop) == (0, "stopped\n", ["75", "stopped"])
    assert ending(stop, folder=tmp_path / "missing") == (75, "stopped\n", ["", ""])


def test_a_fault_of_ours_keeps_its_traceback(ending):
    code, stderr, left = ending("{}['missing']")
    assert (code, left) == (1, ["1", "KeyError: 'missing'"])
    assert "Traceback" in stderr and stderr.endswith("KeyError: 'missing'\n")


def test_what_goes_well_says_nothing(ending):
    assert ending("pass") == (0, "", ["0", ""])


def test_one_that_was_killed_has_said_so_before(ending):
    assert ending("import os; os.kill(os.getpid(), 9)") == (-9, "", ["1", "a process was killed"])


def test_a_closed_stdout_ends_it_silently(ending):
    leaves = (
        "import os; read, write = os.pipe(); os.close(read); os.dup2(write, 1); print('a' * 9999)"
    )
    assert ending(leaves) == (1, "", ["1", ""])


def test_another_broken_pipe_is_a_fault(ending):
    code, stderr, left = ending("raise BrokenPipeError(32, 'Broken pipe')")
    assert (code, left) == (1, ["1", "BrokenPipeError: [Errno 32] Broken pipe"])
    assert "Traceback" in stderr


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_of_several_processes_that_stop_only_the_first_speaks(ending, number):
    code, told = (130, "130") if number == "SIGINT" else (0, "75")
    stop = f"raise Stopped(signal.{number}, 'stopped')"
    assert ending(stop, rank="0") == (code, "stopped\n", [told, "stopped"])
    assert ending(stop, rank="1") == (code, "", [told, ""])


def test_a_mistake_is_left_to_the_first_process_until_the_launcher_ends_the_others(ending):
    """Signals were listened to by then: the launcher's must end it all the same."""
    mistake = (
        "from finetuning.training.signals import Stop; Stop().listen(); "
        "print('now', flush=True); raise UserError('data.path: a')"
    )
    assert ending(mistake, rank="1", stop_after=1) == (-SIGTERM, "", ["2", "error: data.path: a"])


ABORTS_LATE = """
import atexit, os, threading, time
class Aborts:
    def __del__(self, abort=os.abort):
        abort()
aborts = Aborts()  # when Python takes the module apart
atexit.register(lambda: print("of a library", file=sys.stderr))
threading.Thread(target=lambda: [time.sleep(0.3), print("of a thread", file=sys.stderr)]).start()
{}
"""


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("", 0, ""),
        ("raise Stopped(signal.SIGINT, 'stopped')", 130, "stopped"),
        ("{}[1]", 1, "KeyError: 1"),
    ],
    ids=["done", "stopped", "fault"],
)
def test_one_of_several_processes_ends_before_what_gloo_may_abort(ending, end, code, last):
    alone, said, _ = ending(ABORTS_LATE.format(end))
    assert alone == -signal.SIGABRT
    among_others, said_there, left = ending(ABORTS_LATE.format(end), WORLD_SIZE="2")
    assert (among_others, left[0]) == (code, str(code))
    # The thread may speak before or after the end's own line, the library only at the very end.
    assert sorted(said_there.splitlines()) == sorted(said.splitlines())
    assert {last, "of a thread"} - {""} <= set(said.splitlines())
    assert said.endswith("of a library\n")


LOADING = """
import subprocess, sys, time
import psutil
from finetuning.errors import Stopped
from finetuning.training.signals import Stop, worker_ignores_signals
from finetuning.training.loader import EpochLoader

def begin(worker):
    time.sleep(0.3)  # signals come before it knows what to do about them
    worker_ignores_signals(worker)

Stop().listen()
loader = EpochLoader(range(400), num_workers=2, worker_init_fn=begin)
numbers = iter(loader)
workers = psutil.Process().children()
assert len(workers) == 2
for worker in workers:  # from a process that is not their parent
    subprocess.run(["kill", f"-{sys.argv[1]}", str(worker.pid)], check=True)
found = list(map(int, numbers))
assert found == list(range(400)), found
still_loading = iter(loader)
next(still_loading)
raise Stopped(15, "stopped in the middle of an epoch")
"""


def test_a_closed_terminal_ends_what_is_before_training_and_is_noted_in_it(stop):
    with pytest.raises(Stopped) as stopped:
        signal.raise_signal(SIGHUP)
    assert stopped.value.code == 75
    stop.signal = None
    with stop.after_a_step():
        signal.raise_signal(SIGHUP)
        assert stop.signal is SIGHUP


def test_nohup_keeps_a_closed_terminal_ignored():
    signal.signal(SIGHUP, signal.SIG_IGN)
    stop = Stop()
    stop.listen()
    signal.raise_signal(SIGHUP)
    assert stop.signal is None and signal.getsignal(SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("main", ["", "raise UserError('no')"], ids=["done", "mistake"])
def test_a_signal_after_the_end_was_noted_changes_nothing(ending, number, main):
    late = f"import atexit, os; atexit.register(lambda: os.kill(os.getpid(), signal.{number}))"
    code = 2 if main else 0
    assert ending(f"{late}; {main}".removesuffix("; "))[0] == code


def test_a_library_that_makes_another_error_of_ctrl_c_is_interrupted_all_the_same(ending):
    main = "try: raise KeyboardInterrupt\nexcept BaseException as e: raise ImportError('x') from e"
    assert ending(main) == (130, INTERRUPTED, ["130", INTERRUPTED.rstrip()])


def test_a_locale_without_japanese_reads_and_prints_it(ending):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    main = "assert '日本' in arguments[0], arguments; raise UserError('日本')"
    assert ending(main, **ascii_only) == (2, "error: 日本\n", ["2", "error: 日本"])


def test_what_is_printed_outlives_its_terminal(tmp_path):
    """The other end of the terminal is closed while the script runs; it is not sent SIGHUP."""
    main = (
        "print('now'); open(arguments[1]).read(); print('on'); open(arguments[2], 'w').write('x')"
    )
    fifo, end = tmp_path / "fifo", tmp_path / "end"
    os.mkfifo(fifo)
    screen, terminal = os.openpty()
    command = [sys.executable, "-c", SCRIPT, main, str(fifo), str(end)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ
    )
    os.close(terminal)
    assert b"now" in os.read(screen, 100)
    os.close(screen)
    fifo.write_text("go")
    assert process.wait(60) == 0 and end.read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_batches_are_loaded_to_the_end_and_the_loading_processes_end_with_training(number):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", LOADING, str(int(number))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "Stopped: stopped in the middle of an epoch" in done.stderr, done.stderr
