"""The base model that readers of an adapter need, and how it is recorded."""

import json

import torch
from conftest import ROOT
from hub_server import REPO
from publications import LORA, names, published
from run_folders import BASE, S, copied, error_of, files_below, train
from tiny import write_base
from transformers import AutoModelForCausalLM

import publish
from finetuning.recipe.recipe import load_recipe


def test_an_adapter_that_is_published_for_another_base_model_is_noticed(hub, runs, call, tmp_path):
    folder = copied(runs["lora"], tmp_path / "run")
    assert (
        "not published: it cannot be asked: model.name: elith/tiny-base cannot be loaded"
        in error_of(call(publish, folder, *LORA))
    )
    model = AutoModelForCausalLM.from_pretrained(runs["full"].parents[1] / "llama")
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.save_pretrained(tmp_path / "base")
    hub.create(BASE)
    hub.put(BASE, files_below(tmp_path / "base"))
    assert "not published: 2 of 2 answers are not the run folder's" in error_of(
        call(publish, folder, *LORA)
    )
    assert names(hub) == set()


def test_an_adapter_needs_a_base_that_others_have(hub, runs, call, tmp_path):
    run = copied(runs["lora"], tmp_path / "run")
    line = error_of(call(publish, run, "--unasked"))
    assert "base model is the local folder" in line and "publish.base_model=owner/name" in line
    published(call, run, "publish.merged=true")
    card = hub.read(REPO, f"{S}/README.md").decode()
    assert "A model from a folder that is not on the Hub, fine-tuned with LoRA on `" in card
    assert "`. The adapter is merged into full weights." in card
    (tmp_path / "pulled.yaml").write_bytes(hub.read(REPO, f"{S}/recipe.yaml"))
    assert load_recipe(tmp_path / "pulled.yaml").model.name == "./llama"


def test_an_adapter_on_a_base_from_scratch_is_published_merged_only(hub, call, tmp_path):
    import sft

    overrides = ["training.max_steps=2", "training.save_strategy=no", "training.eval_strategy=no"]
    lora = [
        "lora={r: 4, target_modules: [c_attn]}",
        "training.report_to=none",
        "generation.max_new_tokens=4",
    ]
    place = ["publish={repo: elith/llm-book-models, subfolder: chapter05/sft_model}"]
    run = tmp_path / "run"
    recipe = str(ROOT / "recipes/quickstart.yaml")
    data = f"data.path={ROOT / 'recipes/data/quickstart.jsonl'}"
    sft.main([recipe, data, f"training.output_dir={run}", *overrides, *lora, *place])
    assert "add publish.merged=true" in error_of(call(publish, run, "--unasked"))
    done = call(publish, run, "publish.merged=true")
    assert done.code == 0 and "3 of 3 greedy answers are the run folder's" in done.out


def test_a_base_from_the_hub_is_recorded_by_id_and_commit(hub, call, tmp_path):
    hub.create(BASE)
    hub.put(BASE, files_below(write_base(tmp_path / "base", "llama")))
    run = train(tmp_path / "trained" / "run", BASE, "lora={r: 4, target_modules: [q_proj, v_proj]}")
    hub.put(BASE, {"note.txt": b"the base has moved on since"})
    published(call, run)
    first = json.loads((run / "environment.json").read_text())["base_commit"]
    assert first and first != hub.head(BASE)
    config = json.loads(hub.read(REPO, f"{S}/adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, first)
    manifest = json.loads(hub.read(REPO, f"{S}/manifest.json"))
    assert manifest["base"] == {"name": BASE, "subfolder": None, "revision": first}
    assert (
        f'AutoModelForCausalLM.from_pretrained("{BASE}", revision="{first}")'
        in hub.read(REPO, f"{S}/README.md").decode()
    )


def test_a_base_from_the_hub_is_not_called_otherwise(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "base_commit": "0" * 40}))
    assert "names the Hub id of which a local folder is a copy" in error_of(
        call(publish, run, "--unasked", *LORA)
    )
