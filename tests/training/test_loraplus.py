"""LoRA+: an adapter's matrices B learn faster, by peft's own optimizer, also after a resume."""

import pytest
import tiny
import torch
from peft.optimizers import create_loraplus_optimizer
from run_folders import interrupted, run_folder
from safetensors.torch import load_file
from trainings import EPSILON, LORA_TARGETS, RATE, prepared_run, recipe_of, write_rows

from finetuning.errors import UserError
from finetuning.training.train import make_trainer

RATIO = 16
LORA = f"lora={{r: 4, target_modules: {LORA_TARGETS['gpt2']}}}"
PLUS = f"training.loraplus_lr_ratio={RATIO}"


@pytest.fixture
def trainer_of(tmp_path):
    """A function: a trainer of five steps of an adapter."""
    base, tokenizer = tmp_path / "base", tiny.byte_level()
    tiny.model_of("gpt2", vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = write_rows(tmp_path)

    def make(name: str, *overrides: str):
        (tmp_path / name).mkdir()
        more = [LORA, "data.eval=null", "training.weight_decay=0.1", *overrides]
        return make_trainer(prepared_run(recipe_of(("gpt2", base), rows, tmp_path / name, *more)))

    return make


def test_the_optimizer_is_peft_s(trainer_of):
    ours, theirs, plain = trainer_of("ours", PLUS), trainer_of("theirs"), trainer_of("plain")
    settings = {"betas": (0.9, 0.999), "eps": EPSILON, "loraplus_weight_decay": 0.1}
    theirs.optimizer = create_loraplus_optimizer(
        theirs.model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, **settings
    )
    weights = []
    for trainer in (ours, theirs, plain):
        trainer.train()
        weights.append({n: w for n, w in trainer.model.named_parameters() if w.requires_grad})
    rates = {group["initial_lr"] for group in ours.optimizer.param_groups if group["params"]}
    assert rates == {RATE, RATIO * RATE}
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
        assert not torch.equal(weight, weights[2][name]), name


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    settings = [LORA, PLUS, "training.max_steps=4", "training.save_strategy=steps"]
    settings += ["training.save_steps=2", "training.save_total_limit=2"]
    again, whole = (run_folder(tmp_path / name, *settings) for name in ("stopped", "whole"))
    interrupted(again, "checkpoint-4", "adapter_model.safetensors", "sealed.json")
    run_folder(tmp_path / "stopped", *settings)
    ours, theirs = (load_file(run / "adapter_model.safetensors") for run in (again, whole))
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name]), name


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["lora=null"], "is about the matrices of an adapter: add a lora section"),
        (["training.optim=adafactor"], "was not tested with optim adafactor"),
    ],
)
def test_it_is_refused_where_it_would_do_nothing_or_was_not_tested(overrides, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        recipe_of(("gpt2", tmp_path), tmp_path, tmp_path / "run", LORA, PLUS, *overrides)
