"""What an older version left is asked, compared, published and resumed as then.

tests/old_runs/README.md says how they were made.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hub_server import REPO
from run_folders import error_of, files_below, losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import compare
import generate
import publish
import pull
import sft
from finetuning.data.cache import prepare
from finetuning.inference.trained_model import load_trained
from finetuning.recipe.recipe import load_recipe

QUESTIONS = ["What is red?", "日本の首都は？"]
STOPPED = [
    "training.output_dir=stopped",
    "training.save_strategy=steps",
    "training.save_steps=20",
    "training.logging_steps=1",
]


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The working directory, with the old runs in it: finished, adapter, stopped, published."""
    folder = Path(shutil.copytree(ROOT / "tests/old_runs", tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


def answers_of_transformers(folder: Path) -> list[str]:
    """Greedy answers without code of ours; the prompt is spelt as the old version trained it."""
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer(f"### Question: {question}\n### Answer:", return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        new = output[0, prompt["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def test_a_finished_run_answers(old, call):
    done = call(generate, "finished", *QUESTIONS)
    assert done.code == 0, done.err
    assert done.out.splitlines() == answers_of_transformers(old / "finished")


def test_an_adapter_answers_on_the_base_it_was_trained_on(old, call):
    done = call(generate, "adapter", QUESTIONS[0])
    assert done.code == 0 and done.out.strip(), done.err


@pytest.mark.parametrize("kind", ["finished", "adapter"])
def test_the_examples_and_the_loss_on_them_are_those_of_then(old, kind):
    recipe = load_recipe(old / kind / "recipe.yaml")
    tokenizer = AutoTokenizer.from_pretrained(old / kind)
    model = load_trained(old / kind, recipe, tokenizer)
    prepared = prepare(recipe.data, tokenizer)
    environment = json.loads((old / kind / "environment.json").read_text())
    assert prepared.fingerprint == environment["data"]
    loss = tokens = 0
    for example in prepared.eval:
        ids, labels = (torch.tensor(example[name].tolist()) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        loss += F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100).item()
        tokens += int((labels[1:] != -100).sum())
    assert loss / tokens == pytest.approx(losses_of(old / kind, "eval_loss")[-1][1], rel=1e-3)


def test_runs_are_compared_as_far_as_they_are(old, call):
    assert call(compare, "finished", "adapter", "stopped").code == 0
    with (old / "comparison.csv").open() as stream:
        rows = {Path(row["run"]).name: row for row in csv.DictReader(stream)}
    assert rows.keys() == {"finished", "adapter", "stopped"}
    eval_losses = losses_of(old / "finished", "eval_loss")
    assert f"{eval_losses[-1][1]:.6g}"[:5] in json.dumps(rows["finished"])


def test_a_finished_run_is_published_over_what_was_published_of_it(old, hub, call):
    hub.put(REPO, files_below(old / "published"))
    before = hub.tree(REPO)
    done = call(publish, "finished")
    assert done.code == 0, done.err
    for name in ("model.safetensors", "metrics.jsonl", "samples.md"):
        assert hub.tree(REPO)[f"old/{name}"] == before[f"old/{name}"]
    record = json.loads((old / "finished" / "published.json").read_text())
    assert [answer["is_same"] for answer in record["answers"]] == [True, True]


def test_what_was_published_is_pulled_and_answers_as_the_run_folder(old, hub, call):
    hub.put(REPO, files_below(old / "published"))
    done = call(pull, REPO, "old", "pulled")
    assert done.code == 0, done.err
    assert (old / "pulled" / "model.safetensors").read_bytes() == (
        old / "finished" / "model.safetensors"
    ).read_bytes()
    pulled, finished = (call(generate, name, *QUESTIONS).out for name in ("pulled", "finished"))
    assert pulled == finished


def test_a_stopped_run_is_published_as_its_last_checkpoint_is_if_that_is_said(old, hub, call):
    place = (f"publish.repo={REPO}", "publish.subfolder=stopped")
    assert "has no trained model" in error_of(call(publish, "stopped", *place))
    done = call(publish, "stopped", *place, "--unfinished")
    assert done.code == 0 and "2 of 2 greedy answers are the run folder's" in done.out, done.err
    assert "The training was not finished." in hub.read(REPO, "stopped/README.md").decode()
    sent = hub.read(REPO, "stopped/model.safetensors")
    assert sent == (old / "stopped/checkpoint-20/model.safetensors").read_bytes()
    assert {path.name for path in (old / "stopped").iterdir()} == {
        *(path.name for path in (ROOT / "tests/old_runs/stopped").iterdir()),
        *("published.json", ".lock"),
    }


def test_a_finished_run_is_left_alone_and_one_of_another_recipe_refused(old, call):
    weights = (old / "finished" / "model.safetensors").read_bytes()
    again = call(sft, "recipe.yaml")
    assert again.code == 0 and "is finished" in again.out
    refused = call(sft, "recipe.yaml", "training.learning_rate=0.5")
    assert "training.learning_rate was 0.04, is 0.5" in error_of(refused)
    assert (old / "finished" / "model.safetensors").read_bytes() == weights


def test_an_unfinished_run_is_resumed_from_its_checkpoint(old, call):
    before = losses_of(old / "stopped")
    refused = call(sft, "recipe.yaml", *STOPPED, "training.max_steps=50")
    assert "training.max_steps was 60, is 50" in error_of(refused)
    done = call(sft, "recipe.yaml", *STOPPED)
    assert done.code == 0 and "checkpoint-20" in done.err, done.err
    after = losses_of(old / "stopped")
    assert [step for step, _ in after] == list(range(1, 61))
    assert after[:20] == before[:20]
    # Steps 21 to 30 were trained then, and their losses logged, after the checkpoint. Dropout draws
    # for the positions that are computed, of which there are fewer than then.
    again, then = ([loss for _, loss in losses[20:30]] for losses in (after, before))
    assert len(then) == 10 and again == pytest.approx(then, rel=0.2)
    assert json.loads((old / "stopped" / "environment.json").read_text())["finished"]
