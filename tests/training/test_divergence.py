"""A run whose loss or weights are no numbers, or do not move, ends in one line and is not
finished."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import sft
from finetuning.errors import UserError
from finetuning.runs.checkpoints import checkpoints_of, damage_of
from finetuning.training.divergence import FirstNonFinite, norms_of
from finetuning.training.trainer import ResponseTrainer

QUICK = ["training.max_steps=8", "training.report_to=none", "generation.prompts=[]"]
SAVES = ["training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=null"]


def train(folder: Path, *overrides: str) -> None:
    settings = [*QUICK, f"training.output_dir={folder}", *overrides]
    sft.main([str(ROOT / "recipes" / "quickstart.yaml"), *settings])


def environment(folder: Path) -> dict:
    return json.loads((folder / "environment.json").read_text())


@pytest.fixture
def loss_is_nan_at(monkeypatch):
    """A function that has the loss of a step be NaN, gradients and all."""

    def spoil(step: int) -> None:
        compute = ResponseTrainer.compute_loss

        def spoiled(trainer, *args, **kwargs):
            loss = compute(trainer, *args, **kwargs)
            is_now = trainer.model.training and trainer.state.global_step == step - 1
            return loss * float("nan") if is_now and trainer.is_in_train else loss

        monkeypatch.setattr(ResponseTrainer, "compute_loss", spoiled)

    return spoil


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("step", [5, 6])
def test_a_loss_that_is_no_number_ends_the_run_at_its_step(tmp_path, loss_is_nan_at, step):
    loss_is_nan_at(step)
    with pytest.raises(UserError) as refused:
        train(tmp_path / "run", *SAVES, "training.logging_steps=1")
    assert str(refused.value) == (
        f"the loss of step {step} is not finite; the checkpoints before it are kept; most likely "
        "to help, in another training.output_dir: training.learning_rate=2e-04, "
        "training.max_grad_norm=0.25, training.adam_beta2=0.95"
    )
    checkpoints = checkpoints_of(tmp_path / "run")
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-2"]
    assert not any(map(damage_of, checkpoints))
    assert not environment(tmp_path / "run")["finished"]
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("saves", [SAVES, ["training.save_strategy=no", "data.eval=null"]])
def test_weights_that_are_no_numbers_are_neither_saved_nor_finished(tmp_path, monkeypatch, saves):
    """The last step's loss is finite, its gradient is not: no later loss tells."""
    step = ResponseTrainer.training_step

    def spoiled(trainer, *args, **kwargs):
        loss = step(trainer, *args, **kwargs)
        if trainer.state.global_step == 7:
            trainer.model.lm_head.weight.grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(ResponseTrainer, "training_step", spoiled)
    more = ["training.eval_strategy=no", *saves]
    with pytest.raises(UserError, match="the loss or the weights of step 8 are not finite"):
        train(tmp_path / "run", *more)
    assert len(checkpoints_of(tmp_path / "run")) == (3 if saves is SAVES else 0)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert not environment(tmp_path / "run")["finished"]


@pytest.mark.parametrize(
    "setting",
    [
        ["training.learning_rate=0"],
        ["lora={r: 2, lora_alpha: 1, lora_dropout: 0.999999, target_modules: [c_attn]}"],
    ],
    ids=["rate", "dropout"],
)
def test_weights_that_do_not_move_are_not_finished(tmp_path, setting):
    with pytest.raises(UserError, match="no trained weight has moved in 8 steps"):
        train(tmp_path / "run", *setting, "training.weight_decay=0")
    assert not environment(tmp_path / "run")["finished"]


def test_the_first_step_that_is_not_finite_is_kept():
    found = FirstNonFinite(torch.device("cpu"))
    for step, loss in enumerate([1.0, float("inf"), 2.0, float("nan")], start=1):
        found.look_at(torch.tensor(loss), step)
    assert found.poll() == 2
    found.forget()
    assert found.poll() == 0


def test_norms_are_of_trained_weights_and_show_one_number_that_is_none():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert len(norms_of(model)) == 1
    with torch.no_grad():
        model.weight[1, 2] = float("-inf")
    assert not norms_of(model).isfinite().any()
