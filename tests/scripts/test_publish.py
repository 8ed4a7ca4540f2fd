"""src/publish.py against the tests' Hub, by the real clients: what a subfolder then holds."""

import json
import re

import pytest
from hub_server import REPO
from publications import ALWAYS, KINDS, TOKENIZER, WHOLE, names, published
from run_folders import BASE, S, copied, error_of, files_below, retrained
from transformers import AutoModelForCausalLM

import publish
import pull
from finetuning.runs.folder import RunFolder
from finetuning.runs.output_folder import lock


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
    evaluation = RunFolder(folder).evaluation
    assert record["scores"] == {"questions": 4, **evaluation["scores"]["trained"]}
    assert not list(folder.glob(".merged*"))


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
    records = "environment.json, evaluation.json, report.html, samples.json"
    assert f"stays here: a[old].txt, answers.jsonl, checkpoint-30, {records}" in done.out
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


def test_a_foreign_subfolder_is_safe(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    hub.put(REPO, {f"{S}/model.safetensors": b"theirs"})
    assert f"{S} holds files that were not published from here; --replace" in error_of(
        call(publish, run, "--unasked")
    )
    assert hub.read(REPO, f"{S}/model.safetensors") == b"theirs"
    published(call, run, "--replace")
    assert names(hub) == {*ALWAYS, *TOKENIZER, *WHOLE}


def test_another_recipes_model_is_not_overwritten_without_saying_so(hub, runs, call, tmp_path):
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


def test_one_published_model_does_not_contain_another(hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    published(call, run)
    for place in ("chapter05", f"{S}/deeper"):
        line = error_of(call(publish, run, "--unasked", "--replace", f"publish.subfolder={place}"))
        assert place in line and "overlaps the published model in" in line
    assert names(hub) == {*ALWAYS, *TOKENIZER, *WHOLE}


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
