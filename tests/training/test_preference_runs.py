"""Runs of src/dpo.py as a user has them: started, resumed, on an adapter, published, refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hub_server import REPO
from peft import PeftModel
from run_folders import copied, error_of, files_below, interrupted
from safetensors.torch import load_file
from trainings import prepared_run
from transformers import AutoModelForCausalLM

import dpo
import generate
import preview
import publish
import pull
import sft
from finetuning.data.examples import sequences_of
from finetuning.evaluation.compared_run import Run
from finetuning.evaluation.comparison import table_of
from finetuning.recipe.recipe import load_recipe

PAIRS = [
    {"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}!", "rejected": f"It is {n + 1}."}
    for n in range(40)
]


def tune(folder: Path, base: Path | str, *overrides: str) -> Path:
    """The run folder of a short preference tuning of the base."""
    rows = folder.parent / "pairs.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    recipe = ROOT / "recipes/quickstart_dpo.yaml"
    settings = ["max_steps=12", "logging_steps=4", "save_steps=6", "eval_steps=12"]
    settings += ["save_total_limit=2"]
    settings += [
        "learning_rate=3e-3",
        "report_to=none",
        "per_device_train_batch_size=4",
        "global_batch_size=4",
    ]
    dpo.main(
        [
            *(str(recipe), f"model.name={base}", f"training.output_dir={folder}"),
            *(f"data.path={rows}", "evaluation.questions=2", "generation.max_new_tokens=12"),
            *(f"training.{setting}" for setting in settings),
            *("training.loss_type=sigmoid", "training.loss_weights=null"),
            "publish={repo: elith/llm-book-models, subfolder: chapter05/dpo_model}",
            *overrides,
        ]
    )
    return folder


def logged(folder: Path, name: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def tuned(runs, tmp_path_factory) -> Path:
    return tune(tmp_path_factory.mktemp("tuned") / "run", runs["full"])


def test_rewards_begin_at_zero_and_the_chosen_responses_come_to_be_preferred(tuned):
    first, last = logged(tuned, "eval_loss")[0], logged(tuned, "eval_loss")[-1]
    assert first == pytest.approx(np.log(2), abs=1e-6)
    assert logged(tuned, "eval_rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    assert last < first / 2 and logged(tuned, "eval_rewards/accuracies")[-1] == 1.0
    assert logged(tuned, "rewards/margins")[-1] > 0.5
    answers = json.loads((tuned / "evaluation.json").read_text())
    trained = answers["losses"]["trained"]
    assert trained["eval_rewards/accuracies"] == trained["eval_rewards/accuracies_low"] == 1.0
    low, margin, high = (trained[f"eval_rewards/margins{end}"] for end in ("_low", "", "_high"))
    assert low < margin < high


def test_a_comparison_and_the_page_of_a_run_show_its_rewards(runs, tuned):
    columns, rows = table_of([Run(runs["full"]), Run(tuned)], by="reward margin")
    accuracy, margin = (columns.index(f"reward {name}") for name in ("accuracy", "margin"))
    assert [row[accuracy] for row in rows] == [1.0, None] and rows[0][margin] > 0.5
    assert "reward margin" not in table_of([Run(runs["full"])])[0]
    assert "reward margin" in (tuned / "report.html").read_text()


def test_a_budget_counts_pairs_and_their_reference(tuned, tmp_path, call):
    done = call(preview, tuned / "recipe.yaml", f"training.output_dir={tmp_path / 'new'}")
    assert "a length bias" not in done.out and "longest  4 pairs, " in done.out
    assert re.search(r"\d s of computing, the reference\s+included", done.out), done.out


def test_a_run_that_was_stopped_ends_with_the_same_weights(tuned, tmp_path):
    """It goes on from a checkpoint of a model that has learnt since the reference was computed."""
    resumed = copied(tuned, tmp_path / "run")
    lost = ["checkpoint-12", "model.safetensors", "sealed.json"]
    interrupted(resumed, *lost)
    assert (resumed / "checkpoint-6").is_dir()
    recipe = load_recipe(tuned / "recipe.yaml")
    tune(resumed, recipe.model.name, f"data.path={recipe.data.path}")
    before, after = (load_file(run / "model.safetensors") for run in (tuned, resumed))
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert logged(resumed, "rewards/margins") == logged(tuned, "rewards/margins")


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_run_whose_reference_is_lost_is_not_resumed(tuned, tmp_path, call, damage):
    resumed = copied(tuned, tmp_path / "run")
    interrupted(resumed, "checkpoint-12", "model.safetensors", "sealed.json")
    file = resumed / "reference.npz"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-40])
    done = call(dpo, resumed / "recipe.yaml", f"training.output_dir={resumed}")
    assert f"{file} is missing or damaged" in error_of(done)


@pytest.fixture(scope="module")
def on_adapter(runs, tmp_path_factory) -> Path:
    """Preference tuning of what is an adapter already."""
    return tune(tmp_path_factory.mktemp("on_adapter") / "run", runs["lora"])


def test_what_an_adapter_is_held_to_is_that_adapter(runs, on_adapter):
    """With the bare base as the reference, rewards would not begin at 0."""
    assert logged(on_adapter, "eval_rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    assert logged(on_adapter, "eval_loss")[0] == pytest.approx(np.log(2), abs=1e-6)
    recipe = load_recipe(on_adapter / "recipe.yaml")
    run = prepared_run(recipe)
    bare = AutoModelForCausalLM.from_pretrained(recipe.model.name)
    of_base = log_probs_of(bare, run.examples.eval)
    of_adapter = log_probs_of(PeftModel.from_pretrained(bare, runs["lora"]), run.examples.eval)
    with np.load(on_adapter / "reference.npz") as reference:
        found = reference["eval"].reshape(-1, 2, 2).sum(2).ravel()
    assert found == pytest.approx(of_adapter, rel=1e-4)
    assert np.abs(found - of_base).min() > 1


def log_probs_of(model, pairs) -> list[float]:
    """Of each response, the chosen and the rejected of each pair in turn."""
    found = []
    for each in (part for pair in pairs for part in sequences_of(pair)):
        ids, labels = (torch.tensor(each[name].tolist())[None] for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
        loss = F.cross_entropy(logits, labels[:, 1:].long(), reduction="sum")
        found.append(-loss.item())
    return found


def test_what_was_tuned_from_an_adapter_is_one_adapter_on_the_original_base(
    runs, on_adapter, hub, call, tmp_path
):
    """Published, pulled and asked, it answers as the policy did when it was trained."""
    run, began = copied(on_adapter, tmp_path / "run"), runs["lora"]
    recipe, before = load_recipe(run / "recipe.yaml"), load_recipe(began / "recipe.yaml")
    assert recipe.model.name == before.model.name and recipe.model.adapter == str(began)
    assert recipe.lora == before.lora
    weights, old = (load_file(each / "adapter_model.safetensors") for each in (run, began))
    assert weights.keys() == old.keys()
    assert any(not torch.equal(weight, old[name]) for name, weight in weights.items())

    hub.create("elith/tiny-base")
    hub.put("elith/tiny-base", files_below(Path(before.model.name)))
    place = ["publish.base_model=elith/tiny-base", "publish.subfolder=chapter05/dpo"]
    assert call(publish, run, *place).code == 0
    card = hub.read(REPO, "chapter05/dpo/README.md").decode()
    assert "preference-tuned with DPO (beta 0.1, loss sigmoid) with LoRA on" in card
    assert "with the adapter `./run`" in card and "accelerate launch src/dpo.py outputs/" in card
    config = json.loads(hub.read(REPO, "chapter05/dpo/adapter_config.json"))
    assert config["base_model_name_or_path"] == "elith/tiny-base"

    assert call(pull, REPO, "chapter05/dpo", tmp_path / "pulled").code == 0
    question = "What is 3 + 1?"
    answers = {each: call(generate, each, question).out for each in (run, tmp_path / "pulled")}
    answers["hub"] = call(generate, f"hub:{REPO}/chapter05/dpo", question).out
    assert len({*answers.values()}) == 1 and answers[run].strip()
    assert call(generate, began, question).out != answers[run]


def test_sft_and_dpo_refuse_each_others_recipes(call):
    done = call(sft, ROOT / "recipes/quickstart_dpo.yaml")
    assert "reads pairs of responses, which src/dpo.py trains on" in error_of(done)
    done = call(dpo, ROOT / "recipes/quickstart.yaml")
    assert "reads conversations, which src/sft.py trains on" in error_of(done)


def test_an_adapter_of_another_shape_is_refused(runs, call, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    settings = [f"model.name={runs['lora']}", f"data.path={rows}", "lora={r: 8}"]
    done = call(dpo, ROOT / "recipes/quickstart_dpo.yaml", *settings)
    assert "lora.r is 8, of the adapter" in error_of(done)
