"""Tests see no network, no cache and no logger of the machine they run on."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import absl.logging
import pytest
from commands import FAKE_TORCH, ROOT, SHARED, runs_of
from warm import WarmPython

HOME = tempfile.mkdtemp(prefix="finetuning-tests-")
# Before any Hugging Face library is imported: they read these once.
os.environ.update(
    HF_HOME=HOME, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline"
)
os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", NO_COLOR="1", COLUMNS="200")
if "gpu_report" not in sys.modules:  # make test-gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one machine's tests are another's
for name in ("HF_TOKEN", "WANDB_API_KEY", "RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
# uvicorn (transformers serve) closes the log handlers that are there, and absl's closes its stream:
# pytest's, where a test that captures has another standard error by then.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture
def run_script():
    """A function that runs `python src/<script> arguments` from the project's root, like a user.

    Returns what subprocess.run returns: returncode, stdout, stderr.
    """

    def run(
        script: str, *arguments: object, stdin: str = "", timeout: float = 120, **environment: str
    ):
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


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory):
    """A folder that stands first on the path and holds a torch whose import ends the process."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "torch.py").write_text(FAKE_TORCH)
    return folder


@pytest.fixture(scope="session")
def run_fork(without_torch):
    """run_script without torch and quicker: forks of a Python that has imported the rest."""
    python = WarmPython(*SHARED, PYTHONPATH=str(without_torch))
    yield runs_of(python)
    python.end()


@pytest.fixture(scope="session")
def warm():
    """A WarmPython that has imported what training, its launchers and its libraries need."""
    names = ["finetuning.training.train", "accelerate.commands.launch", "torch.distributed.run"]
    python = WarmPython(*names, *(name for name in ["deepspeed"] if find_spec(name)))
    yield python
    python.end()


@pytest.fixture(scope="session")
def run_warm(warm):
    """run_script, 10 CPU seconds quicker where a script trains or generates: a fork of `warm`."""
    return runs_of(warm)


@pytest.fixture(scope="module")
def all_warm(warm):
    """Every Python program that the tests of a module start is a fork of that one."""
    with warm.stands_in():
        yield


@pytest.fixture
def warm_python(warm):
    """Every Python program that the test starts is a fork of that one."""
    with warm.stands_in():
        yield


@pytest.fixture(autouse=True)
def signals():
    """Whoever listens to signals in a test does not listen after it."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def launched(monkeypatch):
    """A function that gives this process the environment of a launcher, and of no other."""

    def launch(environment: dict[str, str]) -> None:
        for name in os.environ:
            if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with the repository elith/llm-book-models; this process and its scripts own it.

    Its cache is tmp_path/home/hub; nothing waits between attempts.
    """
    from hub_server import REPO, HubServer, speak_to

    with HubServer(tmp_path / "hub") as server:
        server.create(REPO)
        server.cards["elith/tiny-base"] = {}
        speak_to(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{kind: finished run folder} of run_folders.make_runs; to be copied before a change."""
    from run_folders import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def crowd(runs, tmp_path_factory):
    """run_folders.make_crowd: a Hub on disk, and a run that replaces a model published there."""
    from run_folders import make_crowd

    return make_crowd(runs, tmp_path_factory.mktemp("crowd"))


@pytest.fixture
def crowded(crowd, hub, tmp_path):
    """(that Hub, serving; a copy of that run folder)."""
    shutil.copytree(crowd.hub, hub.blobs.parent, dirs_exist_ok=True)
    return hub, Path(shutil.copytree(crowd.run, tmp_path / "run"))


@pytest.fixture
def call(monkeypatch, capfd):
    """A function that runs a script's module in this process; returns its code, out and err."""
    from finetuning.script import run

    def call(script, *arguments: object):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        capfd.readouterr()
        try:
            run(script.main, script.__doc__)
            code = 0
        except SystemExit as end:
            code = end.code
        return SimpleNamespace(code=code, **capfd.readouterr()._asdict())

    return call


def pytest_collection_modifyitems(items):
    from gpus import lacking

    for item in items:
        for marker in item.iter_markers("gpu"):
            if reason := lacking(**marker.kwargs):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(programs):
        assert not os.environ.get("CI"), "chromium and chromedriver are not installed"
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    profile = tmp_path_factory.mktemp("browser")
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        f"--user-data-dir={profile}",
        "--lang=en-US",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def pytest_collection_finish():
    """No garbage is looked for among what imports and tests are made of: they live to the end.

    Measured: a fifth of the CPU seconds of tests/data and tests/training/test_trainer.py, and 0.1
    to 0.4 for each of the gc.collect() of accelerate in a training.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
