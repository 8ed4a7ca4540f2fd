"""src/publish.py against the tests' Hub: what travels, and what a reader then loads."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub_server import OWNER, REPO, HubServer
from run_folders import BASE, S, copied, error_of, files_below, retrained, train, write_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import publish
import pull
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.folder import lock

LORA = ("publish.base_model=elith/tiny-base",)
MERGED = (*LORA, "publish.merged=true")
BOTH = (*MERGED, "publish.adapter=true")
ALWAYS = {"README.md", "manifest.json", "recipe.yaml", "samples.md", "metrics.jsonl", "loss.png"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
CONFIGS = {"config.json", "generation_config.json"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}
WHOLE = {*CONFIGS, "model.safetensors"}
KINDS = {
    "full": ("full", (), WHOLE),
    "sharded": (
        "sharded",
        (),
        {*CONFIGS, "model.safetensors.index.json", "model-*-of-*.safetensors"},
    ),
    "adapter": ("lora", LORA, ADAPTER),
    "merged": ("lora", MERGED, WHOLE),
    "both": ("lora", BOTH, {*WHOLE, *(f"adapter/{name}" for name in ADAPTER)}),
}


def published(call, run, *arguments: str):
    done = call(publish, run, "--unasked", *arguments)
    assert done.code == 0, done.err
    return done


def names(hub, subfolder: str = S) -> set[str]:
    return {
        path.removeprefix(f"{subfolder}/")
        for path in hub.tree(REPO)
        if path.startswith(f"{subfolder}/")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_every_kind_is_published_whole_and_answers_as_before(
    kind, hub, runs, call, tmp_path
):
    run, arguments, weights = KINDS[kind]
    folder = copied(runs[run], tmp_path / "run")
    hub.create(BASE)
    hub.put(BASE, files_below(runs["full"].parents[1] / "llama"))
    done = call(publish, folder, *arguments)
    assert done.code == 0, done.err
    shards = {file.name for file in folder.glob("model-*-of-*.safetensors")}
    expected = {*ALWAYS, *TOKENIZER, *(weights - {"model-*-of-*.safetensors"}), *shards}
    assert names(hub) == expected and (len(shards) > 1) == (kind == "sharded")
    assert "2 of 2 greedy answers are the run folder's" in done.out
    record = json.loads((folder / "published.json").read_text(encoding="utf-8"))
    assert (record["commit"], record["tag"]) == (hub.head(REPO), f"{S.replace('/', '.')}.v1")
    assert [answer["is_same"] for answer in record["answers"]] == [True, True]
    assert record["answers"][0]["published"]
    assert not list(folder.glob(".merged*"))


def test_an_adapter_that_is_published_for_another_base_model_is_noticed(hub, runs, call, tmp_path):
    folder = copied(runs["lora"], tmp_path / "run")
    assert (
        "published, but it cannot be asked: model.name: elith/tiny-base cannot be loaded"
        in error_of(call(publish, folder, *LORA))
    )
    model = AutoModelForCausalLM.from_pretrained(runs["full"].parents[1] / "llama")
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.save_pretrained(tmp_path / "base")
    hub.create(BASE)
    hub.put(BASE, files_below(tmp_path / "base"))
    assert "published, but 2 of 2 answers are not the run folder's" in error_of(
        call(publish, folder, *LORA)
    )


BOOK = """
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, subfolder = "elith/llm-book-models", "chapter05/sft_model"
model = AutoModelForCausalLM.from_pretrained(repo, subfolder=subfolder)
tokenizer = AutoTokenizer.from_pretrained("elith/llm-book-models", subfolder="chapter05/sft_model")
"""
PRINT = "print(model(**tokenizer('What is 3 + 1?', return_tensors='pt')).logits.sum().item())"


@pytest.mark.parametrize("kind", ["full", "sharded", "merged"])
def test_the_books_loading_code_gives_the_run_folders_model(kind, hub, runs, call, tmp_path):
    run, arguments, _ = KINDS[kind]
    published(call, copied(runs[run], tmp_path / "run"), *arguments)
    exec(BOOK, loaded := {})
    tokenizer = AutoTokenizer.from_pretrained(runs[run])
    inputs = tokenizer("### Question: What is 3 + 1?", return_tensors="pt")
    assert torch.equal(
        inputs.input_ids,
        loaded["tokenizer"]("### Question: What is 3 + 1?", return_tensors="pt").input_ids,
    )
    logits = AutoModelForCausalLM.from_pretrained(runs[run])(
        **inputs
    ).logits  # of an adapter: on its base
    assert torch.allclose(
        loaded["model"](**inputs).logits, logits, atol=0 if kind != "merged" else 1e-4
    )


def test_the_books_loading_code_works_in_a_process_of_its_own(hub, runs, call, tmp_path):
    published(call, copied(runs["full"], tmp_path / "run"))
    command = [sys.executable, "-c", BOOK + PRINT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    exec(BOOK, loaded := {})
    assert float(done.stdout) == pytest.approx(eval(PRINT.removeprefix("print"), loaded), rel=1e-5)


@pytest.mark.parametrize(
    "place", [("lora", LORA, S), ("lora", BOTH, f"{S}/adapter")], ids=["alone", "beside"]
)
def test_an_adapter_loads_the_documented_way(place, hub, runs, call, tmp_path):
    from peft import PeftModel

    run, arguments, subfolder = place
    published(call, copied(runs[run], tmp_path / "run"), *arguments)
    config = json.loads(hub.read(REPO, f"{subfolder}/adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("elith/tiny-base", None)
    base = AutoModelForCausalLM.from_pretrained(runs["full"].parents[1] / "llama")
    ids = torch.tensor([[5, 6, 7]])
    plain = base(ids).logits
    loaded = PeftModel.from_pretrained(base, REPO, subfolder=subfolder)
    logits = AutoModelForCausalLM.from_pretrained(runs[run])(ids).logits
    assert torch.allclose(loaded(ids).logits, logits, atol=1e-5) and not torch.allclose(
        plain, logits, atol=1e-2
    )


def test_tied_weights_are_sent_once_and_are_tied_again(hub, runs, call, tmp_path):
    published(call, copied(runs["full"], tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(REPO, subfolder=S)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    (tmp_path / "sent").write_bytes(hub.read(REPO, f"{S}/model.safetensors"))
    assert "lm_head.weight" not in load_file(tmp_path / "sent")


def test_nothing_changed_means_no_commit_and_no_tag(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    published(call, run)
    head, tags = hub.head(REPO), hub.tags(REPO)
    done = published(call, run)
    assert (hub.head(REPO), hub.tags(REPO)) == (head, tags) and "unchanged: " in done.out
    hub.put(REPO, {"elsewhere/note.txt": b"by somebody else"})
    published(call, run)
    assert hub.tags(REPO) == tags and hub.titles(REPO)[0] == "by somebody else"


def test_the_subfolder_is_replaced_as_a_whole_and_its_neighbours_stay(hub, runs, call, tmp_path):
    run = copied(runs["sharded"], tmp_path / "run")
    neighbours = {
        f"{S}2/config.json": b"{}",
        "chapter05/note.md": b"mine",
        "chapter06/model.safetensors": b"x",
    }
    published(call, run)
    hub.put(REPO, neighbours)
    AutoModelForCausalLM.from_pretrained(run).save_pretrained(tmp_path / "whole")
    for path in [*run.glob("model-*"), run / "model.safetensors.index.json"]:
        path.unlink()
    (tmp_path / "whole" / "model.safetensors").rename(run / "model.safetensors")
    published(call, run)
    assert names(hub) == {*ALWAYS, *TOKENIZER, *WHOLE}
    assert {path: hub.read(REPO, path) for path in neighbours} == neighbours
    assert sorted(hub.tags(REPO)) == ["chapter05.sft_model.v1", "chapter05.sft_model.v2"]
    assert f"{S}/model.safetensors.index.json" in hub.tree(REPO, "chapter05.sft_model.v1")


def test_a_dry_run_shows_what_would_change_and_changes_nothing(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    (run / "a[old].txt").touch()
    head = hub.head(REPO)
    done = published(call, run, "--dry-run")
    size = f"{(run / 'model.safetensors').stat().st_size:,} bytes"
    assert re.search(rf"new.*{S}/model.safetensors.*{size}", done.out)
    assert "stays here: a[old].txt, checkpoint-30, environment.json, samples.json" in done.out
    published(call, run)
    (run / "samples.md").write_text("# Other\n")
    hub.put(REPO, {f"{S}/stray.txt": b"x"})
    done = published(call, run, "--dry-run")
    assert re.search(rf"changed.*{S}/samples.md", done.out) and re.search(
        rf"gone.*{S}/stray.txt", done.out
    )
    assert re.search(rf"same.*{S}/model.safetensors", done.out)
    assert hub.titles(REPO) == [
        "by somebody else",
        f"Publish {S}",
        "initial commit",
    ] and head != hub.head(REPO)
    assert (
        not (tmp_path / "run" / "published.json").exists()
        or "answers" in (run / "published.json").read_text()
    )


# What must not be overwritten, and what must not travel


def test_a_foreign_subfolder_is_safe(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    hub.put(REPO, {f"{S}/model.safetensors": b"theirs"})
    assert f"{S} holds files that were not published from here; --replace" in error_of(
        call(publish, run, "--unasked")
    )
    assert hub.read(REPO, f"{S}/model.safetensors") == b"theirs"
    published(call, run, "--replace")
    assert names(hub) == {*ALWAYS, *TOKENIZER, *WHOLE}


def test_another_recipes_checkpoint_is_not_overwritten_without_saying_so(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    published(call, run)
    retrained(
        run,
        training__learning_rate="0.5",
        training__output_dir="elsewhere",
        generation__max_new_tokens="9",
    )
    line = error_of(call(publish, run, "--unasked"))
    assert "another recipe: training.learning_rate was 0.01, is 0.5; --replace" in line
    assert hub.titles(REPO)[0] == f"Publish {S}" and len(hub.titles(REPO)) == 2
    published(call, run, "--replace")


def test_checkpoints_do_not_lie_in_each_other(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    published(call, run)
    for place in ("chapter05", f"{S}/deeper"):
        line = error_of(call(publish, run, "--unasked", "--replace", f"publish.subfolder={place}"))
        assert place in line and "would lie in each other" in line
    assert names(hub) == {*ALWAYS, *TOKENIZER, *WHOLE}


def test_only_what_is_allowed_travels(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    (tmp_path / "secret.json").write_text("{}")
    for name in (
        ".env",
        "notes.md",
        "optimizer.pt",
        "pytorch_model.bin",
        "code.py",
        "runs/events",
        "x/config.json",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    (run / "linked.json").symlink_to(tmp_path / "secret.json")
    published(call, run)
    assert names(hub) == {*ALWAYS, *TOKENIZER, *WHOLE}


def spoil_link(run: Path) -> None:
    (run / "config.json").rename(run.parent / "config.json")
    (run / "config.json").symlink_to(run.parent / "config.json")


def spoil_weights(run: Path) -> None:
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1])


def spoil_config(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModel": "code.Model"}})
    )


def spoil_finish(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "finished": None}))


def spoil_samples(run: Path) -> None:
    (run / "samples.md").write_text("# Answers\n\nmy token is hf_" + "a" * 34 + "\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_link, "config.json is a link"),
        (spoil_weights, "model.safetensors is damaged"),
        (spoil_config, "config.json names code of its own (auto_map)"),
        (
            spoil_finish,
            "is not finished; the command that began it goes on with it, --unfinished publishes it",
        ),
        (spoil_samples, "samples.md, line 3: holds a token of the Hub"),
        (lambda run: (run / "model.safetensors").unlink(), "has no trained model"),
        (lambda run: (run / "recipe.yaml").unlink(), "is no run folder"),
    ],
)
def test_a_folder_that_others_could_not_use_is_refused(spoil, words, hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    spoil(run)
    line = error_of(call(publish, run, "--unasked"))
    assert words in line and "a" * 34 not in line
    assert hub.titles(REPO) == ["initial commit"]


def test_a_missing_shard_is_named(hub, runs, call, tmp_path):
    run = copied(runs["sharded"], tmp_path / "run")
    shard = sorted(run.glob("model-*"))[1]
    shard.unlink()
    assert f"has no {shard.name}" in error_of(call(publish, run, "--unasked"))
    (run / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is damaged" in error_of(call(publish, run, "--unasked"))


def test_an_unfinished_run_is_published_when_that_is_said_and_its_card_says_it(
    hub, runs, call, tmp_path
):
    run = copied(runs["full"], tmp_path / "run")
    spoil_finish(run)
    published(call, run, "--unfinished")
    assert b"**The training was not finished.**" in hub.read(REPO, f"{S}/README.md")


def test_nothing_that_was_published_or_printed_holds_the_token_or_a_path_of_this_machine(
    hub, runs, call, tmp_path
):
    run = copied(runs["lora"], tmp_path / "run")
    done = call(publish, run, *BOTH)
    kept = files_below(tmp_path / "hub") | {f"local {n}": c for n, c in files_below(run).items()}
    kept |= {
        "printed": (done.out + done.err).encode(),
        "requests": json.dumps(hub.requests).encode(),
    }
    assert [name for name, content in kept.items() if OWNER.encode() in content] == []
    home = str(runs["lora"].parents[1]).encode()
    assert home in kept["local recipe.yaml"], "the run was trained on local folders"
    blobs = {
        name: content for name, content in kept.items() if not name.startswith(("local", "printed"))
    }
    assert [
        name
        for name, content in blobs.items()
        if home in content or str(tmp_path).encode() in content
    ] == []
    assert not any(request["auth"] for request in hub.requests if request["path"].startswith("/_"))


# Base models


def test_an_adapter_needs_a_base_that_others_have(hub, runs, call, tmp_path):
    run = copied(runs["lora"], tmp_path / "run")
    line = error_of(call(publish, run, "--unasked"))
    assert "base model is the local folder" in line and "publish.base_model=owner/name" in line
    published(call, run, "publish.merged=true")
    card = hub.read(REPO, f"{S}/README.md").decode()
    assert (
        "A model from a folder that is not on the Hub, fine-tuned with LoRA, "
        "merged into full weights" in card
    )
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
    assert "says what a local folder is a copy of" in error_of(
        call(publish, run, "--unasked", *LORA)
    )


# Two at once


def test_two_subfolders_published_at_once_both_stand(hub, runs, tmp_path):
    from finetuning.publishing.bundle import gather_publication
    from finetuning.publishing.commit import publish as commit

    prepared = []
    for name, kind in (("chapter05/first", "full"), ("chapter06/second", "sharded")):
        run = retrained(copied(runs[kind], tmp_path / kind), publish__subfolder=name)
        prepared.append(gather_publication(run, load_recipe(run / "recipe.yaml"), None))
    barrier = threading.Barrier(2)
    hub.fault(
        "/commit/", times=2, call=lambda: barrier.wait(10)
    )  # both have read the same head by then
    results = []
    threads = [
        threading.Thread(target=lambda p=p: results.append(commit(p, replace=False)))
        for p in prepared
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2 and 412 in hub.sent("/commit/")
    assert {*names(hub, "chapter05/first")} and {*names(hub, "chapter06/second")}
    card = hub.read(REPO, "README.md").decode()
    assert "[chapter05/first]" in card and "[chapter06/second]" in card
    assert sorted(hub.titles(REPO)) == [
        "Publish chapter05/first",
        "Publish chapter06/second",
        "initial commit",
    ]


# Names


@pytest.mark.parametrize(
    "subfolder",
    [
        "../x",
        "",
        "a//b",
        "/absolute",
        "a/",
        "a/../b",
        "a\\b",
        "x" * 300,
        "日本語",
        "Chapter05",
        "a b",
        ".git",
        "a/.env",
        ".",
    ],
)
def test_a_subfolder_of_another_form_is_refused_before_anything_is_asked(
    subfolder, hub, runs, call, tmp_path
):
    line = error_of(call(publish, runs["full"], f"publish.subfolder='{subfolder}'"))
    assert "publish.subfolder" in line and len(line) < 500
    assert not hub.sent("/api/models")


@pytest.mark.parametrize(
    "repo", ["../x", "llm-book-models", "elith/", "elith/a/b", "日本/語", "elith/" + "x" * 300]
)
def test_a_repository_of_another_form_is_refused_before_anything_is_asked(repo, hub, runs, call):
    assert "publish.repo" in error_of(call(publish, runs["full"], f"publish.repo={repo}"))
    assert not hub.sent("/api/models")


# Who may do what


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, REPO, ("there is none", "hf auth login", "HF_TOKEN")),
        ("hf_revoked", REPO, ("does not know the token", "https://huggingface.co/settings/tokens")),
        ("hf_reader", REPO, ("may not", "write access to elith", "publish.repo=you/name")),
        ("hf_other", REPO, ("may not", "write access to elith")),
        (OWNER, "elith/none", ("no such repository", "hf repos create elith/none")),
    ],
)
def test_who_may_not_publish_is_told_why_and_what_to_do(
    token, repo, words, hub, runs, call, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", token or "")
    line = error_of(done := call(publish, runs["full"], f"publish.repo={repo}"))
    assert done.code == 2 and [word for word in words if word not in line] == []
    assert not hub.sent("/commit/") and (token is None or token not in line)


def test_without_network_the_hub_is_named_and_the_code_is_1(hub, runs, call, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = call(publish, runs["full"])
    assert (
        "http://127.0.0.1:9 could not be reached for elith/llm-book-models" in error_of(done)
        and done.code == 1
    )


def test_offline_mode_is_named(hub, runs, call, run_script):
    done = run_script("publish.py", runs["full"], HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set; unset it" in done.stderr


@pytest.mark.parametrize("argument", ["--dryrun", "training.max_steps=3", "x"])
def test_arguments_that_mean_nothing_are_refused(argument, hub, runs, call):
    assert argument in error_of(call(publish, runs["full"], argument))


def test_a_recipe_without_a_place_is_told_how_to_name_one(hub, runs, call, tmp_path):
    run = retrained(copied(runs["full"], tmp_path / "run"), publish="null")
    assert "publish.repo=owner/name publish.subfolder=folder/name" in error_of(call(publish, run))
    published(call, run, f"publish.repo={REPO}", "publish.subfolder=mine")
    assert "model.safetensors" in names(hub, "mine")


# Faults: one disturbed request is survived, a lasting disturbance ends in one line

FAULTS = {
    "access, 503": ("auth-check", {"status": 503}),
    "head, 503": ("/revision/main", {"status": 503}),
    "head, 429": ("/revision/main", {"status": 429, "headers": {"Retry-After": "0"}}),
    "head, answer lost": ("/revision/main", {"drop_response": True}),
    "tree, 503": ("/tree/", {"status": 503}),
    "tree, reset": ("/tree/", {"reset_after": 0}),
    "card, 503": ("validate-yaml", {"status": 503}),
    "preupload, 503": ("/preupload/", {"status": 503}),
    "batch, 503": ("objects/batch", {"status": 503}),
    "bytes, 503": ("PUT /_lfs/", {"status": 503}),
    "bytes, 429": ("PUT /_lfs/", {"status": 429, "headers": {"Retry-After": "0"}}),
    "bytes, reset": ("PUT /_lfs/", {"reset_after": 20_000}),
    "bytes, closed early": ("PUT /_lfs/", {"eof_after": 20_000}),
    "bytes, late": ("PUT /_lfs/", {"delay": 0.5}),
    "commit, 500": ("/commit/", {"status": 500}),
    "commit, 503": ("/commit/", {"status": 503}),
    "commit, 429": ("/commit/", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=1'}}),
    "commit, reset": ("/commit/", {"reset_after": 100}),
    "commit, closed early": ("/commit/", {"eof_after": 100}),
    "commit, answer lost": ("/commit/", {"drop_response": True}),
    "commit, 412": ("/commit/", {"status": 412}),
    "tags, 503": ("/refs", {"status": 503}),
    "tag, 503": ("/tag/", {"status": 503}),
    "tag, answer lost": ("/tag/", {"drop_response": True}),
    "neighbour's manifest, 503": ("/resolve/", {"status": 503}),
    "neighbour's manifest, reset": ("/resolve/", {"reset_after": 0}),
    "neighbour's manifest, flipped byte": (
        "GET /elith/llm-book-models/resolve/",
        {"corrupt": True},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_survived_and_makes_one_commit(fault, crowd, crowded, call):
    (hub, run), (match, what) = crowded, FAULTS[fault]
    hub.fault(match, **what)
    published(call, run)
    assert not any(next(fault["due"], False) for fault in hub.faults), "the fault never happened"
    assert_all_is_new(hub, crowd)


LASTING = [
    name
    for name in FAULTS
    if name not in ("bytes, late", "commit, answer lost", "tag, answer lost")
]


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_ends_in_one_line_and_the_same_command_later_succeeds(
    fault, crowd, crowded, call
):
    (hub, run), (match, what) = crowded, FAULTS[fault]
    old = hub.tree(REPO)
    hub.fault(match, times=99, **what)
    done = call(publish, run, "--unasked")
    line = error_of(done)
    assert done.code == 1 and "give the same command again" in line and OWNER not in done.err
    assert hub.tree(REPO) in (old, crowd.tree)
    hub.faults.clear()
    published(call, run)
    assert_all_is_new(hub, crowd)


def assert_all_is_new(hub: HubServer, crowd) -> None:
    """One commit and one tag more than before, and every byte of the new state."""
    assert hub.tree(REPO) == crowd.tree
    assert hub.titles(REPO) == [
        f"Publish {S}",
        "Publish chapter06/other",
        f"Publish {S}",
        "initial commit",
    ]
    assert hub.tags(REPO)["chapter05.sft_model.v2"] == hub.head(REPO) and len(hub.tags(REPO)) == 3


def test_a_commit_by_somebody_else_in_between_is_built_upon(crowded, call):
    hub, run = crowded
    hub.fault("/commit/", call=lambda: hub.put(REPO, {"chapter07/new.txt": b"theirs"}))
    published(call, run)
    assert hub.read(REPO, "chapter07/new.txt") == b"theirs"
    assert hub.titles(REPO)[:2] == [f"Publish {S}", "by somebody else"]


def test_somebody_else_in_the_same_subfolder_in_between_is_not_overwritten(crowded, call):
    hub, run = crowded
    hub.fault("/commit/", call=lambda: hub.put(REPO, {f"{S}/manifest.json": b"{}"}))
    assert "not published from here" in error_of(call(publish, run, "--unasked"))
    assert hub.read(REPO, f"{S}/manifest.json") == b"{}"


def test_interrupted_it_ends_with_130_and_the_same_command_later_succeeds(crowd, crowded, call):
    hub, run = crowded
    old, reached = hub.tree(REPO), threading.Event()
    hub.fault("/commit/", call=lambda: reached.set() or time.sleep(3))
    command = [sys.executable, "src/publish.py", run, "--unasked"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reached.wait(120)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert (
        errors.splitlines()[-1]
        == "interrupted; the repository is as it was, or has the whole commit"
    )
    assert hub.tree(REPO) in (old, crowd.tree)
    published(call, run)
    assert_all_is_new(hub, crowd)


def test_a_run_folder_that_is_in_use_is_not_published(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    with lock(run):
        assert "is in use" in error_of(call(publish, run, "--unasked"))
    published(call, run)


def test_what_was_published_is_what_is_pulled(hub, runs, call, tmp_path):
    published(call, copied(runs["full"], tmp_path / "run"))
    assert call(pull, REPO, S, tmp_path / "pulled").code == 0
    pulled, run = files_below(tmp_path / "pulled"), files_below(runs["full"])
    assert set(pulled) == {*ALWAYS, *TOKENIZER, *WHOLE}
    same = {*TOKENIZER, *WHOLE, "samples.md", "metrics.jsonl"}
    assert {name: pulled[name] for name in same} == {name: run[name] for name in same}
