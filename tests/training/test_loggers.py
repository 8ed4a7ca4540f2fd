"""A run that is stopped and resumed is one run in every logger, and no step is logged twice."""

import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from run_folders import interrupted, run_folder
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from finetuning.errors import UserError
from finetuning.recipe.recipe import load_recipe
from finetuning.training import loggers
from finetuning.training.loggers import mlflow_run, require_loggers

STEPS = [
    *("training.save_steps=2", "training.max_steps=6", "training.save_total_limit=null"),
    *("training.logging_steps=1", "training.eval_strategy=no", "generation.prompts=[]"),
    *("training.save_strategy=steps", "training.report_to=[tensorboard, trackio]"),
]
# What transformers calls of trackio, which is not installed here; each call becomes a line.
TRACKIO = """
from pathlib import Path
from types import SimpleNamespace

def write(*words):
    with Path(__file__).with_suffix(".log").open("a") as stream:
        print(*words, file=stream)

def init(project, name, resume, **more):
    write("run", name, resume)

def log(figures):
    write("step", figures["train/global_step"], *sorted(figures))

def finish():
    pass

class Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)

config = Config()
__version__ = "0.43.0"
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
"""


def steps_shown(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_loggers_show_one_run_with_every_step_once(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "trackio.py").write_text(TRACKIO, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    folder = run_folder(tmp_path, *STEPS)
    interrupted(folder, "checkpoint-6", "checkpoint-4", "model.safetensors")
    run_folder(tmp_path, *STEPS)
    (runs,) = (folder / "runs").iterdir()
    counted = Counter(steps_shown(runs))
    assert counted == Counter(range(1, 7))

    told = (tmp_path / "trackio.log").read_text().splitlines()
    (name,) = {line.split()[1] for line in told if line.startswith("run")}
    assert name.startswith("run-")
    steps = Counter(line for line in told if line.startswith("step"))
    assert max(steps.values()) == 1
    assert {int(line.split()[1]) for line in steps if "train/loss" in line} == {*range(1, 7)}


def test_every_launch_of_a_run_takes_up_its_run_in_mlflow(tmp_path, monkeypatch):
    begun = SimpleNamespace(info=SimpleNamespace(run_id="a1"))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(active_run=lambda: begun))
    monkeypatch.setenv("MLFLOW_RUN_ID", "")
    monkeypatch.delenv("MLFLOW_RUN_ID")
    first = mlflow_run(tmp_path / "mlflow_run")
    assert "MLFLOW_RUN_ID" not in os.environ
    first.on_train_begin(None, SimpleNamespace(is_world_process_zero=True), None)
    first.on_train_end(None, None, None)
    assert os.environ.pop("MLFLOW_RUN_ID") == "a1"  # for what is logged after training
    mlflow_run(tmp_path / "mlflow_run")
    assert os.environ["MLFLOW_RUN_ID"] == "a1"


def require(name: str, folder: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"training.report_to={name}"])
    require_loggers(recipe, folder)


@pytest.mark.parametrize("name", sorted({*INTEGRATION_TO_CALLBACK} - {"kubeflow"}))
def test_a_logger_that_is_not_installed_is_refused_with_what_to_install(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(loggers, "is_there", lambda module: False)
    with pytest.raises(UserError, match=f"report_to: {name} is not installed: pip install "):
        require(name, tmp_path)


def test_a_part_of_a_package_is_looked_for_without_a_traceback(tmp_path, monkeypatch):
    assert loggers.is_there("importlib.metadata") and not loggers.is_there("no_such.part.of_it")
    monkeypatch.delenv(loggers.KUBEFLOW, raising=False)
    with pytest.raises(UserError, match="kubeflow is for jobs of Kubeflow"):
        require("kubeflow", tmp_path)
    monkeypatch.setenv(loggers.KUBEFLOW, "here")
    require("kubeflow", tmp_path)


@pytest.fixture
def no_wandb(monkeypatch):
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_wandb_is_told_the_run_that_is_in_the_folder(tmp_path, no_wandb):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", ["training.report_to=wandb"])
    require_loggers(recipe, tmp_path)
    assert "WANDB_RUN_ID" not in os.environ
    for age, name in enumerate(["offline-run-20260101_000000-b2", "run-20260102_000000-a1"]):
        (tmp_path / "wandb" / name).mkdir(parents=True)
        os.utime(tmp_path / "wandb" / name, (age, age))
    require_loggers(recipe, tmp_path)
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("a1", "allow")
