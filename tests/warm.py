"""Starts Python programs as forks of a Python that has imported beforehand.

Importing what training needs takes ten seconds of CPU, a fork of a process that has it 0.1. While
`WarmPython.popen` stands in the place of subprocess.Popen, every program of this Python (`python
FILE`, `python -m MODULE`, `accelerate launch`) is such a fork, and what a program starts in turn is
a fork of it, as an accelerate launcher's ranks are. They are processes like others: environment,
streams, exit code and signals are their own, as is the command line that others see, and they are
children of who started them. What a library reads when it is imported it has read before.

python tests/warm.py SOCKET ROOM [MODULE ...]   modules to import beforehand
"""

import atexit
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import thread as futures_thread
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

REAL_POPEN = subprocess.Popen
SIGNATURE = inspect.signature(REAL_POPEN._execute_child)
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
NOT_TAKEN = ("executable", "preexec_fn", "pass_fds", "shell")
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
MESSAGE = 1 << 18  # bytes: more than any environment
COMMAND_LINE = 1 << 12  # bytes of room for that of a fork, in an argument of the server


class WarmPython:
    """A process that has imported the modules; `popen` is a subprocess.Popen of its forks."""

    def __init__(self, *modules: str, **environment: str) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno()), COMMAND_LINE * "-", *modules]
            self.process = REAL_POPEN(
                command,
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries print when they are imported
            )
        self.popen = popen_by(self.fork)

    def fork(self, program: dict, streams: list[int]) -> int:
        with adopting():
            socket.send_fds(self.socket, [json.dumps(program).encode()], streams)
            answer = self.socket.recv(64)
        assert answer, "tests/warm.py ended: run it by hand to see why"
        return int(answer)

    def run(self, *command: object, **keywords: object) -> subprocess.CompletedProcess:
        """subprocess.run of a fork."""
        with self.stands_in():
            return subprocess.run(list(map(str, command)), **keywords)

    @contextmanager
    def stands_in(self) -> Iterator[None]:
        before, subprocess.Popen = subprocess.Popen, self.popen
        try:
            yield
        finally:
            subprocess.Popen = before

    def end(self) -> None:
        self.socket.close()
        self.process.wait()


@contextmanager
def adopting() -> Iterator[None]:
    """Orphans among its descendants become children of this process, which can wait for them."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def popen_by(fork: Callable[[dict, list[int]], int]) -> type[subprocess.Popen]:
    """A subprocess.Popen whose Python programs are started by `fork(program, streams)`."""

    class Popen(REAL_POPEN):
        def _execute_child(self, *arguments):
            told = SIGNATURE.bind(self, *arguments).arguments
            program = program_of(told)
            if not program:
                return super()._execute_child(*arguments)
            pipes = [told["p2cread"], told["c2pwrite"], told["errwrite"]]
            streams = [own if pipe == -1 else pipe for own, pipe in enumerate(pipes)]
            self.pid = fork(program, streams)
            self._child_created = True
            self._close_pipe_fds(*(told[name] for name in PIPES))

    return Popen


def program_of(told: dict) -> dict | None:
    """What become() needs of a command, if it is one of this Python and nothing unusual."""
    command = told["args"] if isinstance(told["args"], list | tuple) else [told["args"]]
    python, *words = map(os.fspath, command)
    if any(told[name] for name in NOT_TAKEN):
        return None
    if Path(python) == Path(sys.executable).with_name("accelerate"):
        words = [python, *words]
    elif python != sys.executable:
        return None
    unbuffered = words[:1] == ["-u"]
    words = words[unbuffered:]
    if not words or (words[0].startswith("-") and words[0] != "-m"):
        return None
    return {
        "words": words,
        "unbuffered": unbuffered,
        "folder": os.fspath(told["cwd"] or os.getcwd()),
        "environment": dict(told["env"] or os.environ),
        "session": bool(told["start_new_session"]),
    }


def serve(connection: socket.socket) -> None:
    """Forks for each message, which is a program and its three streams; answers with the pid."""
    while True:
        message, streams, *_ = socket.recv_fds(connection, MESSAGE, 3)
        if not message:
            return
        ours, theirs = os.pipe()
        if not os.fork():
            # This one ends at once, so that the program is adopted by who asked for it.
            os.write(theirs, str(fork(json.loads(message), streams)).encode())
            os._exit(0)
        os.wait()
        connection.send(os.read(ours, 64))
        for descriptor in (ours, theirs, *streams):
            os.close(descriptor)


def fork(program: dict, streams: list[int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork() or become(streams=streams, **program)


def become(
    words: list[str],
    unbuffered: bool,
    folder: str,
    environment: dict[str, str],
    session: bool,
    streams: list[int],
) -> NoReturn:
    """Goes on as that program."""
    if session:
        os.setsid()
    for standard, descriptor in enumerate(streams):
        os.dup2(descriptor, standard)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    futures_thread._threads_queues.clear()  # the threads of a pool are its, and not waited for
    sys.stdout.reconfigure(write_through=unbuffered)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    more = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    is_module = words[0] == "-m"
    own = folder if is_module else str(Path(words[0]).resolve().parent)
    sys.path[:] = [own, *more, *sys.path[1:]]
    write_command_line([sys.executable, *words])
    sys.argv = words[is_module:]
    subprocess.Popen = popen_by(fork)
    run = partial(runpy.run_module, alter_sys=True) if is_module else runpy.run_path
    end(exit_code(partial(run, sys.argv[0], run_name="__main__")))


def write_command_line(words: list[str]) -> None:
    """Has ps and psutil see these, and empty words after them.

    They are read where the kernel put the server's, proc(5).
    """
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = map(int, stat[45:47])  # arg_start, arg_end
    text = b"\0".join(map(os.fsencode, words))
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, min(len(text), end - start - 1))


def exit_code(run: Callable[[], object]) -> int:
    """Of a program; what it does not catch is printed as Python prints it."""
    try:
        run()
    except SystemExit as request:
        if request.code is None or isinstance(request.code, int):
            return request.code or 0
        print(request.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(code: int) -> NoReturn:
    """As Python ends, but for the frames of the program that forked this one."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def main(descriptor: str, room: str, *modules: str) -> None:
    subprocess.Popen = popen_by(fork)  # before torch keeps another
    sys.path[0] = str(Path(__file__).parents[1] / "src")
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # a fork's end need not visit (and so copy) what it shares
    serve(socket.socket(fileno=int(descriptor)))


if __name__ == "__main__":
    main(*sys.argv[1:])
