"""Tests see no network, no cache and no logger of the machine they run on."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = tempfile.mkdtemp(prefix="finetuning-tests-")
# Before any Hugging Face library is imported: they read these once.
os.environ.update(HF_HOME=HOME, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline")
os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", NO_COLOR="1", COLUMNS="200")
for name in ("HF_TOKEN", "WANDB_API_KEY", "RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_script():
    """A function that runs `python src/<script> arguments` from the project's root, like a user.

    Returns what subprocess.run returns: returncode, stdout, stderr.
    """

    def run(script: str, *arguments: object, stdin: str = "", timeout: float = 120, **environment: str):
        return subprocess.run(
            [sys.executable, f"src/{script}", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(autouse=True)
def signals():
    """Whoever listens to signals in a test does not listen after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def launched(monkeypatch):
    """A function that gives this process the environment of a launcher, and nothing of another one."""

    def launch(environment: dict[str, str]) -> None:
        for name in os.environ:
            if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launch


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU on this machine"))
