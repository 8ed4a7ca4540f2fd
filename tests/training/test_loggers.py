"""A run that is stopped and resumed is one run in every logger, and no step is logged twice."""

import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import interrupted, run_folder

from finetuning.recipe.recipe import load_recipe
from finetuning.training.loggers import require_loggers

STEPS = [
    *("training.save_steps=2", "training.max_steps=6", "training.save_total_limit=null"),
    *("training.logging_steps=1", "training.eval_strategy=no", "generation.prompts=[]"),
    *("training.save_strategy=steps", "training.report_to=tensorboard"),
]


def steps_shown(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_tensorboard_shows_one_run_with_every_step_once(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = run_folder(tmp_path, *STEPS)
    interrupted(folder, "checkpoint-6", "checkpoint-4", "model.safetensors")
    run_folder(tmp_path, *STEPS)
    (runs,) = (folder / "runs").iterdir()
    counted = Counter(steps_shown(runs))
    assert counted == Counter(range(1, 7))


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
