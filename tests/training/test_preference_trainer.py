"""Preference tuning against trl.DPOTrainer, and against a plain loop, step by step."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import trainings
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trainings import EPSILON, LORA_TARGETS, RATE, prepared_run, trained, write_pairs
from transformers import AutoModelForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from finetuning.data.examples import IGNORE_INDEX, sequences_of
from finetuning.errors import UserError
from finetuning.model.preference_loss import ScoredPairs, summed_losses
from finetuning.recipe.sections import LossType, PreferenceTraining
from finetuning.training.reference import find_reference
from finetuning.training.train import make_trainer

STEPS, PAIRS = 4, 4
FIGURES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
FIGURES += ("logps/chosen", "logps/rejected", "grad_norm")


def recipe_of(base: tuple[str, Path], folder: Path, *overrides: str):
    settings = ["data.reader=preference", "data.order=sequential", "training.beta=0.3"]
    settings += [f"training.max_steps={STEPS}", f"training.per_device_train_batch_size={PAIRS}"]
    rows = write_pairs(folder, 24)
    return trainings.recipe_of(base, rows, folder / "run", *settings, *overrides)


def logged(trainer) -> list[list[float]]:
    """FIGURES of every step. The first has an accuracy of 0: rounding decides which of two rewards
    of 0 is higher.
    """
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps[0] = {**steps[0], "rewards/accuracies": 0.0}
    return [[entry[name] for name in FIGURES] for entry in steps]


@pytest.fixture(scope="module", params=["gpt2", "llama", "bloom"])
def base(request, tmp_path_factory) -> tuple[str, Path]:
    """(architecture, folder with a small model and tokenizer of it)"""
    return request.param, tiny.write_base(tmp_path_factory.mktemp(request.param), request.param)


def lora_of(base: tuple[str, Path]) -> str:
    return f"lora={{r: 4, lora_alpha: 32, target_modules: {LORA_TARGETS[base[0]]}}}"


def policy_of(recipe, base):
    model = AutoModelForCausalLM.from_pretrained(base[1])
    if recipe.lora:
        set_seed(42)
        settings = recipe.lora.model_dump(exclude_unset=True)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    return model


class Theirs(DPOTrainer):
    """On pairs that are tokenized."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def trl_of(recipe, base, folder: Path):
    """trl's own trainer on the same pairs in the same order, when it has trained."""
    run = prepared_run(recipe)
    rows = []
    for pair in run.examples.train:
        both = sequences_of(pair)
        is_trained = [each["labels"] != IGNORE_INDEX for each in both]
        ids = [each["input_ids"] for each in both]
        row = {"prompt_ids": ids[0][~is_trained[0]].tolist()}
        for name, each, at in zip(("chosen", "rejected"), ids, is_trained, strict=True):
            row[f"{name}_ids"] = each[at].tolist()
        rows.append(row)
    given = recipe.training.model_dump(exclude_unset=True, exclude={"output_dir"})
    settings = {**given, "use_cpu": True, "bf16": False, "max_length": None, "report_to": "none"}
    settings |= {"train_sampling_strategy": "sequential", "gradient_checkpointing": False}
    args = DPOConfig(str(folder / "trl"), **settings)
    model = policy_of(recipe, base)
    dataset = Dataset.from_list(rows)
    trainer = Theirs(model, args=args, train_dataset=dataset, processing_class=run.tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_figure_of_every_step_is_trls_in_either_layout(base, tmp_path, method):
    """Loss, rewards, accuracies, margins, log-probabilities and the norm of the gradient, also of a
    step of several micro-batches; and the loss is that of a plain loop.
    """
    overrides = [lora_of(base)] if method == "lora" else []
    overrides += ["training.loss_type=[sigmoid, ipo, sft]", "training.loss_weights=[1, 0.2, 0.1]"]
    recipe = recipe_of(base, tmp_path, *overrides)
    theirs = logged(trl_of(recipe, base, tmp_path))
    assert len(theirs) == STEPS and theirs[0][0] != pytest.approx(theirs[-1][0], rel=1e-3)
    if method == "full":
        losses = [line[0] for line in theirs]
        assert plain_loop(recipe, base) == pytest.approx(losses, rel=1e-4)
    halves = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    for changes in (["data.layout=packed", *halves], ["data.layout=padded"]):
        ours = logged(trained(recipe_of(base, tmp_path, *overrides, *changes)))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)


KINDS = [kind for kind in LossType.__args__ if kind != "sft"]
DIVERGENCES = [
    {"loss_type": kind, "f_divergence_type": name, "f_alpha_divergence_coef": 0.3}
    for name in ("forward_kl", "js_divergence", "alpha_divergence")
    for kind in ("sigmoid", "ipo", "discopop")
]


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": kind, "label_smoothing": 0.1} for kind in KINDS),
        {"loss_type": "sft"},
        {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 0.3, -0.2]},
        *DIVERGENCES,
        *({"loss_type": kind, "ld_alpha": 0.4} for kind in ("sigmoid", "sft", "ipo")),
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_a_loss_and_its_gradient_are_what_trl_makes_of_the_same_log_probabilities(settings):
    torch.manual_seed(0)
    counts = [(5, 3), (2, 7), (4, 4)]
    length = 8
    mask = torch.zeros(6, length + 1, dtype=torch.long)  # chosen, then rejected; the first: prompt
    for number, pair in enumerate(counts):
        for half, count in enumerate(pair):
            mask[number + 3 * half, 1 : count + 1] = 1
    by_token = torch.randn(6, length) * mask[:, 1:]
    reference = by_token + 0.3 * torch.randn(6, length) * mask[:, 1:]
    given, wanted = (by_token.clone().requires_grad_() for _ in range(2))
    training = PreferenceTraining(output_dir="x", beta=0.7, **settings)

    expected = trl_loss(training, wanted, reference, mask)
    tokens = [[(s := min(pair)), pair[0] - s, s, pair[1] - s] for pair in counts]
    ours = ScoredPairs(
        torch.stack(parts(given, tokens)),
        torch.stack(parts(reference, tokens)),
        torch.tensor(tokens),
        training,
    )
    of_pairs, of_tokens = summed_losses(ours)
    loss = of_pairs / len(counts) + of_tokens / sum(chosen for chosen, _ in counts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    # Theirs adds up padding, too, whose log-probabilities are 0.
    torch.testing.assert_close(given.grad, wanted.grad * mask[:, 1:], rtol=1e-4, atol=1e-6)


def parts(by_token, tokens) -> list[torch.Tensor]:
    """(4,) of each pair: within the shorter length and behind it."""
    found = []
    for number, (shared, more, _, other) in enumerate(tokens):
        chosen, rejected = by_token[number], by_token[number + len(tokens)]
        cut = [chosen[:shared], chosen[shared : shared + more]]
        cut += [rejected[:shared], rejected[shared : shared + other]]
        found.append(torch.stack([part.sum() for part in cut]))
    return found


def trl_loss(training, by_token, reference, mask) -> torch.Tensor:
    """What trl's own function returns for a model with these log-probabilities."""
    zeros = torch.zeros_like(by_token)
    output = SimpleNamespace(
        log_probs=by_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    reference_output = SimpleNamespace(log_probs=reference)
    names = ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "beta")
    trainer = SimpleNamespace(
        **{name: getattr(training, name) for name in names},
        model=SimpleNamespace(training=True),
        ref_model=lambda **_: reference_output,
        loss_types=training.loss_types,
        loss_weights=training.loss_weights or [1.0] * len(training.loss_types),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_trainer, "disable_gradient_checkpointing", lambda *_: nullcontext())
        patch.setattr(dpo_trainer, "is_peft_model", lambda model: False)
        return DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)


class Metrics(dict):
    def __missing__(self, name):
        self[name] = []
        return self[name]


def plain_loop(recipe, base) -> list[float]:
    """The losses of those steps, one response after another, with all logits and a second model."""
    run, beta = prepared_run(recipe), recipe.training.beta
    pairs = list(run.examples.train)
    policy, frozen = (AutoModelForCausalLM.from_pretrained(base[1]) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), RATE, eps=EPSILON, weight_decay=0.0)

    def log_prob(model, part):
        ids, labels = (torch.tensor(part[name].tolist())[None] for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
        return -F.cross_entropy(logits, labels[:, 1:].long(), reduction="sum")

    losses = []
    for step in range(STEPS):
        both = [sequences_of(pair) for pair in pairs[step * PAIRS : (step + 1) * PAIRS]]
        sizes = [[int((part["labels"] != IGNORE_INDEX).sum()) for part in pair] for pair in both]
        total = 0.0
        for (chosen, rejected), (more, less) in zip(both, sizes, strict=True):
            with torch.no_grad():
                reference = log_prob(frozen, chosen), log_prob(frozen, rejected)
            found = log_prob(policy, chosen), log_prob(policy, rejected)
            better, worse = (new - old for new, old in zip(found, reference, strict=True))
            dpo = -F.logsigmoid(beta * (better - worse))
            ipo = (better / more - worse / less - 1 / (2 * beta)) ** 2
            sft = -found[0] / sum(size for size, _ in sizes)
            loss = (dpo + 0.2 * ipo) / PAIRS + 0.1 * sft
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.fixture
def dropping(tmp_path) -> tuple[str, Path]:
    """A model that drops a tenth, everywhere."""
    tokenizer, shares = tiny.byte_level(), ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    model = tiny.model_of("gpt2", vocab_size=len(tokenizer), **dict.fromkeys(shares, 0.1))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return "gpt2", tmp_path / "base"


def test_a_model_with_dropout_is_its_own_reference_and_keeps_its_config(dropping, tmp_path):
    trainer = trained(recipe_of(dropping, tmp_path))
    assert logged(trainer)[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.model.config.attn_pdrop == 0.1


def test_a_model_that_is_not_its_own_reference_is_refused(dropping, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "finetuning.training.preference_trainer.disable_dropout", lambda model: None
    )
    with pytest.raises(UserError, match="the model is not its own reference before the first step"):
        trained(recipe_of(dropping, tmp_path))
    with_dropout = "training.disable_dropout=false"  # as asked for
    losses = [line[0] for line in logged(trained(recipe_of(dropping, tmp_path, with_dropout)))]
    assert losses[0] != pytest.approx(math.log(2), abs=1e-4)


def test_only_the_pairs_that_a_short_run_sees_have_a_reference(dropping, tmp_path):
    reference = trained(recipe_of(dropping, tmp_path, "data.order=random")).train_dataset.reference
    assert (~torch.tensor(reference).isnan().any(1)).sum() == STEPS * PAIRS


def test_another_run_on_the_same_weights_and_pairs_does_not_ask_the_reference_again(
    dropping, tmp_path, monkeypatch
):
    """Only the first pairs are, with which a run checks that the model is its own reference."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    run = prepared_run(recipe_of(dropping, tmp_path))
    trainer = make_trainer(run)
    trainer.state.max_steps = 1
    asked = []
    log_probs = trainer.log_probs
    monkeypatch.setattr(trainer, "log_probs", lambda batch: asked.append(1) or log_probs(batch))

    def passes() -> int:
        asked.clear()
        trainer.train_dataset.reference[:] = math.nan
        find_reference(trainer, run)
        return len(asked)

    assert passes() == 3  # of training, of evaluation, and of the check
    reference = trainer.train_dataset.reference.copy()
    assert passes() == 1
    assert np.array_equal(reference, trainer.train_dataset.reference, equal_nan=True)
    for file in (tmp_path / "cache/finetuning").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:-40])
    assert passes() == 3
    trainer.args.per_device_eval_batch_size = 2
    assert passes() == 5
    with torch.no_grad():
        trainer.model.transformer.ln_f.bias += 1e-6
    assert passes() == 5
    trainer.model.config.layer_norm_epsilon *= 2
    assert passes() == 5
    trainer.model.config._name_or_path = "another folder"
    assert passes() == 1
