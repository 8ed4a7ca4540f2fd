"""Our trainer against a plain loop that computes every example alone, with all logits, and steps a
plain AdamW.
"""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from trainings import (
    EPSILON,
    GLOBAL_BATCH,
    LORA_TARGETS,
    RATE,
    STEPS,
    losses_of,
    prepared_run,
    recipe_of,
    trained,
    write_rows,
)

from finetuning.model.loading import load_model
from finetuning.model.tokenizer import load_tokenizer
from finetuning.training.train import make_trainer


@pytest.fixture(scope="module", params=["gpt2", "llama", "bloom"])
def base(request, tmp_path_factory) -> tuple[str, Path]:
    """(architecture, folder with a small model and tokenizer of it)"""
    return request.param, tiny.write_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def reference(recipe, trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and trained weights of a loop without batches: one example after another, full logits,
    token-weighted.
    """
    model = load_model(recipe.model, load_tokenizer(recipe.model, []), seed=42)
    if recipe.lora:
        from transformers import set_seed

        set_seed(42)  # trl seeds before it makes the adapter
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump(exclude_unset=True))
        )
    model.train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    loader = trainer.get_train_dataloader()
    accumulation = trainer.args.gradient_accumulation_steps
    micro_batches = [
        numbers
        for _, numbers in zip(range(STEPS * accumulation), loader.batch_sampler, strict=False)
    ]
    losses = []
    for step in range(STEPS):
        of_step = micro_batches[step * accumulation : (step + 1) * accumulation]
        numbers = [number for micro_batch in of_step for number in micro_batch]
        examples = [loader.dataset[number] for number in numbers]
        tokens = sum(int((example["labels"] != -100).sum()) for example in examples)
        total = 0.0
        for example in examples:
            ids, labels = (
                torch.tensor(example[name].tolist())[None] for name in ("input_ids", "labels")
            )
            logits = model(input_ids=ids).logits
            loss = (
                F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100)
                / tokens
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_and_weights_are_those_of_a_loop_over_single_examples(
    base, rows, tmp_path, method, layout, accumulation
):
    overrides = [
        f"data.layout={layout}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.per_device_train_batch_size={GLOBAL_BATCH // accumulation}",
    ]
    if method == "lora":
        overrides.append(f"lora={{r: 4, lora_alpha: 8, target_modules: {LORA_TARGETS[base[0]]}}}")
    recipe = recipe_of(base, rows, tmp_path / "run", *overrides)
    trainer = trained(recipe)
    losses, weights = reference(recipe, trainer)
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-5)
    found = {
        name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name].detach(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_that_are_computed_again_give_the_same_training(base, rows, tmp_path, method):
    overrides = ["training.activation_checkpointing=true"]
    if method == "lora":
        overrides.append(f"lora={{r: 4, lora_alpha: 8, target_modules: {LORA_TARGETS[base[0]]}}}")
    recipe = recipe_of(base, rows, tmp_path / "run", *overrides)
    trainer = trained(recipe)
    assert trainer.model.is_gradient_checkpointing
    losses, weights = reference(recipe, trainer)
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-5)
    found = dict(trainer.model.named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(found[name].detach(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_batch_is_copied_without_waiting_and_without_its_labels(
    base, rows, tmp_path, monkeypatch, layout
):
    recipe = recipe_of(base, rows, tmp_path / "run", f"data.layout={layout}")
    trainer = make_trainer(prepared_run(recipe))
    batch = next(iter(trainer.get_train_dataloader()))
    copies, copy = [], torch.Tensor.to
    with monkeypatch.context() as patched:
        patched.setattr(
            torch.Tensor,
            "to",
            lambda *args, **given: copies.append((args, given)) or copy(*args, **given),
        )
        inputs = trainer._prepare_inputs(batch)
    assert inputs.keys() == batch.keys() - {"labels"}
    assert all(inputs[name] == batch[name] for name in ("lengths", "shared"))
    tensors = inputs.keys() - {"lengths", "shared"}
    assert [args[1:] for args, _ in copies] == [(trainer.args.device,)] * len(tensors)
    assert all(given == {"non_blocking": True} for _, given in copies)
    assert all(torch.equal(inputs[name], batch[name]) for name in tensors)


def test_evaluation_counts_every_response_token_once(base, rows, tmp_path):
    recipe = recipe_of(
        base,
        rows,
        tmp_path / "run",
        "training.max_steps=1",
        "training.per_device_eval_batch_size=3",
    )
    trainer = trained(recipe)
    metrics = trainer.evaluate()
    trainer.model.eval()
    loss = tokens = correct = 0
    for example in trainer.eval_dataset:
        ids, labels = (torch.tensor(example[name].tolist()) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = trainer.model(input_ids=ids[None]).logits[0, :-1]
        wanted = labels[1:]
        loss += F.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100).item()
        tokens += int((wanted != -100).sum())
        correct += int((logits.argmax(-1) == wanted)[wanted != -100].sum())
    assert metrics["eval_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(correct / tokens)


def test_metrics_file_has_one_object_for_every_logged_step(base, rows, tmp_path):
    trainer = trained(recipe_of(base, rows, tmp_path / "run", "training.max_steps=3"))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(
        line["padding_share"] == 0 and line["response_tokens_per_second"] > 0 for line in steps
    )
    assert all(0.05 < line["memory_gib"] < 500 for line in steps)
    assert any("eval_loss" in line for line in lines)
    assert trainer.state.global_step == 3
