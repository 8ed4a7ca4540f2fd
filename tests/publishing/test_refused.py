"""What is not published: names, links, damage, tokens, other people's files."""

import json
from pathlib import Path

import pytest
from hub_server import OWNER, REPO
from publications import ALWAYS, BOTH, TOKENIZER, WHOLE, names, published
from run_folders import S, copied, error_of, files_below, interrupted, retrained

import publish


def test_only_what_is_allowed_is_published(hub, runs, call, tmp_path):
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
    interrupted(run)


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
            "is not finished; the command that began it resumes it, --unfinished publishes it",
        ),
        (spoil_samples, "samples.md, line 3: holds a secret (Hugging Face token)"),
        (lambda run: (run / "model.safetensors").unlink(), "has no trained model"),
        (lambda run: (run / "recipe.yaml").unlink(), "is not a run folder"),
    ],
)
def test_a_folder_that_others_could_not_use_is_refused(spoil, words, hub, runs, call, tmp_path):
    run = copied(runs["full"], tmp_path / "run")
    (run / "sealed.json").unlink()  # as before run folders were sealed
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


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, REPO, ("none is set", "hf auth login", "HF_TOKEN")),
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


def test_offline_mode_is_named(hub, runs, call, run_warm):
    done = run_warm("publish.py", runs["full"], HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set; unset it" in done.stderr


@pytest.mark.parametrize("argument", ["--dryrun", "training.max_steps=3", "x"])
def test_arguments_that_mean_nothing_are_refused(argument, hub, runs, call):
    assert argument in error_of(call(publish, runs["full"], argument))


def test_a_recipe_without_a_place_is_told_how_to_name_one(hub, runs, call, tmp_path):
    run = retrained(copied(runs["full"], tmp_path / "run"), publish="null")
    assert "publish.repo=owner/name publish.subfolder=folder/name" in error_of(call(publish, run))
    published(call, run, f"publish.repo={REPO}", "publish.subfolder=mine")
    assert "model.safetensors" in names(hub, "mine")
