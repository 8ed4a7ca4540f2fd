"""src/pull.py against the tests' Hub, and what takes models from there: generate.py and sft.py."""

import errno
import json
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from hub_server import OWNER, REPO
from huggingface_hub import constants
from run_folders import S, copied, error_of, files_below, retrained, train
from safetensors.numpy import save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import generate
import publish
import pull
import sft
from finetuning.errors import UserError
from finetuning.recipe.recipe import load_recipe

SAID = (
    rf"^hub:{REPO}/{S}@[0-9a-f]{{40}}\n"
    r"12 files, [0-9,]+ bytes: every sha256 is the one in manifest\.json$"
)
LARGE = np.random.default_rng(0).integers(
    0, 256, 25_000_000, dtype=np.uint8
)  # bytes; downloads go in steps of 10 MB


def pulled(call, *arguments, folder=None):
    done = call(pull, REPO, *(arguments or (S,)), *([folder] if folder else []))
    assert done.code == 0, done.err
    return done


def weights(hub, revision: str = "main") -> bytes:
    return hub.read(REPO, f"{S}/model.safetensors", revision)


@pytest.fixture
def served(crowded):
    """The Hub with a published model."""
    return crowded[0]


def test_it_says_what_it_has_and_where(served, call, tmp_path):
    done = pulled(call, folder=tmp_path / "mine")
    assert re.search(SAID, done.out, re.MULTILINE) and "full, trained on ./rows.jsonl" in done.out
    assert f"folder: {tmp_path / 'mine'}" in done.out
    files = files_below(tmp_path / "mine")
    assert files == {
        path.removeprefix(f"{S}/"): served.read(REPO, path)
        for path in served.tree(REPO)
        if S in path
    }
    assert not [path for path in (tmp_path / "mine").rglob("*") if path.is_symlink()]


def test_without_a_folder_it_stays_in_the_cache(served, call, tmp_path):
    folder = pulled(call).out.splitlines()[-1].removeprefix("folder: ")
    assert folder.startswith(str(tmp_path / "home")) and folder.endswith(S)


def test_the_address_may_be_one_word_as_everything_else_prints_it(served, call, tmp_path):
    address = f"hub:{REPO}/{S}@{served.head(REPO)}"
    done = call(pull, address, tmp_path / "mine")
    assert done.code == 0 and done.out.splitlines()[0] == address, done.err
    assert files_below(tmp_path / "mine").keys() >= {"model.safetensors", "recipe.yaml"}


def test_a_revision_is_a_tag_a_branch_or_a_commit(crowded, call, tmp_path):
    hub, run = crowded
    old = weights(hub)
    model = AutoModelForCausalLM.from_pretrained(run)
    with torch.no_grad():
        model.transformer.wte.weight += 1
    model.save_pretrained(run)
    (run / "sealed.json").unlink()  # these weights are meant
    assert call(publish, run, "--unasked").code == 0
    assert old != weights(hub)
    for revision, expected in (
        ("chapter05.sft_model.v1", old),
        (hub.head(REPO), weights(hub)),
        ("main", weights(hub)),
    ):
        pulled(call, f"{S}@{revision}", folder=tmp_path / revision)
        assert (tmp_path / revision / "model.safetensors").read_bytes() == expected
    assert "no such branch, tag or commit" in error_of(call(pull, REPO, f"{S}@v9"))


def test_a_folder_that_is_there_is_not_written_over(served, call, tmp_path):
    (tmp_path / "mine").mkdir()
    pulled(call, folder=tmp_path / "mine")
    assert "exists already" in error_of(call(pull, REPO, S, tmp_path / "mine"))


def test_a_missing_subfolder_is_told_what_there_is(served, call):
    for name in ("chapter05", "chapter09"):
        line = error_of(call(pull, REPO, name))
        assert f"{REPO} has no safetensors in {name}; published there: {S}, chapter06/other" in line


def test_a_folder_that_may_not_be_written_is_told_in_one_line(served, call, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(
        "finetuning.hub.snapshot.shutil.copyfile", refuse
    )  # root may write everywhere
    line = error_of(done := call(pull, REPO, S, tmp_path / "mine"))
    assert done.code == 2 and "Permission denied" in line and str(tmp_path) in line
    assert not list(tmp_path.glob("*mine*"))


@pytest.mark.parametrize("arguments", [(), (REPO,), (REPO, S, "a", "b")])
def test_arguments_that_mean_nothing_are_refused(arguments, call):
    done = call(pull, *arguments)
    assert done.code == 2 and ("usage: " in done.err or pull.__doc__.strip() in done.err)


@pytest.mark.parametrize(
    "subfolder", ["../x", "", "a//b", "/absolute", "a/", "a/../b", "a\\b", "x" * 300, "a@", "a@b c"]
)
def test_a_subfolder_of_another_form_is_refused_before_anything_is_asked(subfolder, hub, call):
    line = error_of(call(pull, REPO, subfolder))
    assert "expected" in line and len(line) < 400
    assert not hub.sent("/api/models")


@pytest.mark.parametrize(
    "repo", ["../x", "models", "日本/語", "elith/a--b", "elith/a.", "a-/b", "elith/" + "x" * 300]
)
def test_a_repository_of_another_form_is_refused_before_anything_is_asked(repo, hub, call):
    assert "is not a repository" in error_of(call(pull, repo, S))
    assert not hub.sent("/api/models")


@pytest.mark.parametrize("name", ["日本語/モデル", "Chapter 5/[a]*", "x" * 200])
def test_a_folder_that_others_named_otherwise_is_pulled(name, served, call, tmp_path):
    files = {
        path.removeprefix(f"{S}/"): served.read(REPO, path)
        for path in served.tree(REPO)
        if path.startswith(S)
    }
    served.put(REPO, {f"{name}/{path}": content for path, content in files.items()})
    pulled(call, name, folder=tmp_path / "mine")
    assert files_below(tmp_path / "mine") == files


# Never silently old, never damaged, never unsafe


def test_a_revoked_token_with_a_warm_cache_is_an_error_and_not_old_weights(served, call):
    pulled(call)
    served.tokens.clear()
    line = error_of(done := call(pull, REPO, S))
    assert done.code == 2 and "does not know the token" in line and OWNER not in done.err
    assert error_of(call(generate, f"hub:{REPO}/{S}", "What is 3 + 1?")) == line


def test_a_hub_that_is_down_with_a_warm_cache_is_an_error_and_not_old_weights(served, call):
    pulled(call)
    served.fault("/api/models", status=503, times=99)
    assert "503" in error_of(done := call(pull, REPO, S)) and done.code == 1


def test_offline_it_takes_the_cache_only_when_told_so_and_verifies_it(served, call, monkeypatch):
    done = pulled(call)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(served.requests)
    assert pulled(call).out == done.out and len(served.requests) == asked
    assert "is not in the cache" in error_of(call(pull, REPO, "chapter06/other"))
    folder = done.out.splitlines()[-1].removeprefix("folder: ")
    flip(f"{folder}/model.safetensors")
    assert "model.safetensors is not what was published" in error_of(call(pull, REPO, S))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "damaged in transfer, fetched again: model.safetensors" in pulled(call).out


def test_offline_a_model_is_found_that_was_pulled_before_another(served, call, monkeypatch):
    """The cache knows one newest commit of a repository, that of the last pull."""
    first = pulled(call)
    served.put(REPO, {"chapter09/note.txt": b"by somebody else"})
    pulled(call, "chapter06/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = pulled(call)
    assert again.out == first.out and f"from the cache: {first.out.splitlines()[0]}" in again.err


def test_offline_a_card_that_was_taken_away_on_the_hub_is_not_missed(
    served, call, monkeypatch, tmp_path
):
    record = served.record(REPO)
    tree = {
        path: entry
        for path, entry in served.at(REPO, "main")["tree"].items()
        if path != f"{S}/README.md"
    }
    served.add_commit(record, "main", tree, "mallory", "without the card")
    pulled(call)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "11 files" in pulled(call, folder=tmp_path / "mine").out


def flip(path: str) -> None:
    with open(path, "r+b") as stream:
        stream.seek(-1, 2)
        byte = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("match", ["GET /_cdn/", f"GET /{REPO}/resolve/"])
def test_a_flipped_byte_is_found_and_mended(match, served, call, tmp_path):
    served.fault(match, corrupt=True)
    done = pulled(call, folder=tmp_path / "mine")
    assert "damaged in transfer, fetched again: " in done.out
    assert files_below(tmp_path / "mine").keys() >= {"model.safetensors"}
    pulled(call, folder=tmp_path / "again")
    assert files_below(tmp_path / "mine") == files_below(tmp_path / "again")


def test_a_byte_that_is_always_flipped_is_an_error_and_mended_the_next_time(served, call, tmp_path):
    served.fault("GET /_cdn/", corrupt=True, times=99)
    line = error_of(done := call(pull, REPO, S, tmp_path / "mine"))
    assert (
        "checksum mismatch after two downloads" in line
        and done.code == 1
        and not (tmp_path / "mine").exists()
    )
    served.faults.clear()
    pulled(call, folder=tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == weights(served)


def test_a_file_that_was_changed_after_publishing_is_found(served, call):
    served.put(REPO, {f"{S}/README.md": b"a card may be edited"})
    pulled(call)
    head = served.head(REPO)
    served.put(REPO, {f"{S}/chat_template.jinja": b"added by somebody"})
    assert "chat_template.jinja is not what was published" in error_of(call(pull, REPO, S))
    pulled(call, f"{S}@{head}")
    config = json.loads(served.read(REPO, f"{S}/config.json"))
    served.put(REPO, {f"{S}/config.json": json.dumps({**config, "n_head": 2}).encode()})
    assert "is not what was published" in error_of(call(pull, REPO, S))


def test_a_manifest_does_not_lead_out_of_the_folder(served, call, tmp_path, monkeypatch):
    manifest = json.loads(served.read(REPO, f"{S}/manifest.json"))
    config = manifest["files"]["config.json"]
    (tmp_path / "mine").mkdir()
    for name in ("../stolen.json", "/etc/passwd", "../../chapter06/other/config.json"):
        files = {**manifest["files"], name: config}
        served.put(REPO, {f"{S}/manifest.json": json.dumps({**manifest, "files": files}).encode()})
        for is_offline in (False, True):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
            line = error_of(
                call(pull, REPO, f"{S}@{served.head(REPO)}", tmp_path / "mine" / "deep")
            )
            assert f"{name} is not what was published" in line
    assert not list((tmp_path / "mine").iterdir())


def test_a_model_without_a_manifest_is_compared_with_what_the_hub_lists(
    served, call, runs, tmp_path
):
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    files = {f"book/{name}": (runs["full"] / name).read_bytes() for name in names}
    served.put(
        REPO,
        {
            **files,
            "book/training_args.bin": b"pickle",
            "book/optimizer.pt": b"pickle",
            "book/x.py": b"import",
        },
    )
    served.fault("GET /_cdn/", corrupt=True)
    done = pulled(call, "book", folder=tmp_path / "mine")
    assert "4 files" in done.out and "compared with the Hub's checksums; no manifest" in done.out
    assert "left on the Hub, not part of a model: training_args.bin, optimizer.pt, x.py" in done.out
    assert set(files_below(tmp_path / "mine")) == set(names)
    assert "has no recipe.yaml" in error_of(call(generate, f"hub:{REPO}/book", "What is 3 + 1?"))


def test_pickled_weights_and_remote_code_are_refused(served, call):
    served.put(REPO, {"a/config.json": b"{}", "a/pytorch_model.bin": b"pickle"})
    assert "has no safetensors in a; pytorch_model.bin is a pickle" in error_of(
        call(pull, REPO, "a")
    )
    model = weights(served)
    served.put(
        REPO,
        {"b/config.json": b'{"auto_map": {}}', "b/model.safetensors": model, "b/model.py": b"x"},
    )
    assert "names code of its own (auto_map)" in error_of(call(pull, REPO, "b"))
    assert not [request for request in served.requests if request["path"].endswith((".bin", ".py"))]


@pytest.mark.parametrize(("cut", "goes_on"), [("eof_after", True), ("reset_after", False)])
def test_files_complete_before_a_download_broke_off_are_not_fetched_again(
    cut, goes_on, hub, call, tmp_path
):
    """The client itself continues a file that was closed early; after a reset it begins again."""
    content = save({"weight": LARGE})
    hub.put(REPO, {"large/config.json": b"{}", "large/model.safetensors": content})
    hub.fault("GET /_cdn/", **{cut: 22_000_000})
    pulled(call, "large", folder=tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == content
    first, second = (
        request["range"] for request in hub.requests if request["path"].startswith("/_cdn/")
    )
    assert first is None and (second or "").startswith("bytes=2") == goes_on
    assert len(hub.sent(f"GET /{REPO}/resolve")) <= 3, "config.json was fetched again"


FAULTS = {
    "head, 503": ("/revision/main", {"status": 503}),
    "head, 429": ("/revision/main", {"status": 429, "headers": {"Retry-After": "0"}}),
    "head, answer lost": ("/revision/main", {"drop_response": True}),
    "tree, 503": ("/tree/", {"status": 503}),
    "tree, reset": ("/tree/", {"reset_after": 0}),
    "metadata, 503": (f"HEAD /{REPO}/resolve", {"status": 503}),
    "metadata, 429": (f"HEAD /{REPO}/resolve", {"status": 429}),
    "metadata, reset": (f"HEAD /{REPO}/resolve", {"drop_response": True}),
    "small file, 503": (f"GET /{REPO}/resolve", {"status": 503}),
    "bytes, 503": ("GET /_cdn/", {"status": 503}),
    "bytes, 429": ("GET /_cdn/", {"status": 429, "headers": {"Retry-After": "0"}}),
    "bytes, reset": ("GET /_cdn/", {"reset_after": 65_536}),
    "bytes, closed early": ("GET /_cdn/", {"eof_after": 65_536}),
    "bytes, late": ("GET /_cdn/", {"delay": 1.5}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_survived(fault, served, call, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    match, what = FAULTS[fault]
    served.fault(match, **what)
    pulled(call, folder=tmp_path / "mine")
    assert not any(next(fault["due"], False) for fault in served.faults), "the fault never happened"
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == weights(served)


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "bytes, late"])
def test_a_lasting_fault_ends_in_one_line_and_the_same_command_later_succeeds(
    fault, served, call, tmp_path
):
    match, what = FAULTS[fault]
    served.fault(match, times=999, **what)
    line = error_of(done := call(pull, REPO, S, tmp_path / "mine"))
    assert (
        done.code == 1 and "run the same command again" in line and not (tmp_path / "mine").exists()
    )
    served.faults.clear()
    pulled(call, folder=tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == weights(served)


def test_a_download_by_xet_that_fails_ends_in_one_line_too(served, call, tmp_path, monkeypatch):
    """Its client tells every failure by a bare RuntimeError."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    served.promises_xet = True
    line = error_of(done := call(pull, REPO, S, tmp_path / "mine"))
    assert done.code == 1 and "run the same command again" in line
    assert len(served.sent("/v1/reconstructions/")) > 1, "not tried again"
    served.promises_xet = False
    pulled(call, folder=tmp_path / "mine")


def test_interrupted_it_ends_at_once_with_130(served, call, tmp_path):
    served.fault("GET /_cdn/", delay=60)
    command = [sys.executable, "src/pull.py", REPO, S, tmp_path / "mine"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not served.sent("GET /_cdn/"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted; the same command resumes where it stopped"
    assert not (tmp_path / "mine").exists()
    pulled(call, folder=tmp_path / "mine")


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("", "elith/none", ("no such repository", "it is private", "hf auth login")),
        ("", "elith/hidden", ("no such repository", "it is private", "hf auth login")),
        ("hf_other", "elith/hidden", ("no such repository", "the token may not see it")),
        ("hf_revoked", REPO, ("does not know the token",)),
    ],
)
def test_who_may_not_read_is_told_why(token, repo, words, served, call, monkeypatch):
    served.create("elith/hidden", private=True)
    monkeypatch.setenv("HF_TOKEN", token)
    line = error_of(done := call(pull, repo, S))
    assert done.code == 2 and [word for word in words if word not in line] == []


# Asking and training on


def test_generate_takes_the_run_folder_first_and_else_the_published_model(
    crowded, call, runs, tmp_path
):
    hub, run = crowded
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        (retrained(run, training__output_dir=str(tmp_path / "run")) / "recipe.yaml").read_text()
    )
    asked = len(hub.requests)
    local = call(generate, recipe, "What is 3 + 1?")
    assert local.code == 0 and len(hub.requests) == asked
    (run / "model.safetensors").unlink()  # config.json stays, as a killed run leaves it
    fetched = call(generate, recipe, "What is 3 + 1?")
    assert (
        f"{run} has no trained model; taken from the Hub: hub:{REPO}/{S}@{hub.head(REPO)}"
        in fetched.err
    )
    assert fetched.out == local.out == call(generate, f"hub:{REPO}/{S}", "What is 3 + 1?").out
    hub.fault("/api/models", status=503, times=99)
    line = error_of(call(generate, recipe, "What is 3 + 1?"))
    assert (
        "has no trained model, and " in line
        and f"train it: accelerate launch src/sft.py {recipe}" in line
    )


def test_generate_asks_a_published_adapter_on_its_base_from_the_hub(hub, call, runs, tmp_path):
    run = copied(runs["lora"], tmp_path / "run")
    hub.create("elith/tiny-base")
    hub.put("elith/tiny-base", files_below(runs["full"].parents[1] / "llama"))
    assert call(publish, run, "--unasked", "publish.base_model=elith/tiny-base").code == 0
    expected = call(generate, run, "What is 3 + 1?").out
    assert call(generate, f"hub:{REPO}/{S}", "What is 3 + 1?").out == expected
    hub.fault("/api/models/elith/tiny-base", status=503, times=2)
    assert call(generate, f"hub:{REPO}/{S}", "What is 3 + 1?").out == expected
    hub.fault("/api/models/elith/tiny-base", status=503, times=99)
    line = error_of(done := call(generate, f"hub:{REPO}/{S}", "What is 3 + 1?"))
    assert "could not be reached for elith/tiny-base" in line and done.code == 1


def test_a_token_that_is_not_known_is_what_training_names(hub, call, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    line = error_of(done := call(sft, "recipes/dolly_gpt2.yaml"))
    assert done.code == 2 and "openai-community/gpt2: the Hub does not know the token" in line


def test_training_starts_from_a_published_model_pinned_to_its_commit(served, call, runs, tmp_path):
    base = f"hub:{REPO}/{S}"
    run = train(tmp_path / "on" / "run", base, "training.max_steps=2")
    name = load_recipe(run / "recipe.yaml").model.name
    assert name == f"{base}@{served.head(REPO)}"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    began = json.loads((runs["full"] / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_loss"] < began["eval_loss"] - 1, "it did not begin with the trained weights"
    assert call(publish, run, "--unasked", "publish.subfolder=chapter06/on").code == 0
    manifest = json.loads(served.read(REPO, "chapter06/on/manifest.json"))
    assert manifest["base"]["name"] == REPO and manifest["base"]["subfolder"] == S
    assert name.endswith(manifest["base"]["revision"])


def test_a_run_keeps_the_commit_it_began_with_whatever_is_published_meanwhile(
    served, call, tmp_path
):
    base, folder = f"hub:{REPO}/{S}", tmp_path / "on" / "run"
    train(folder, base, "training.max_steps=2")
    began = load_recipe(folder / "recipe.yaml").model.name
    served.put(REPO, {"chapter09/note.txt": b"by somebody else"})
    train(folder, base, "training.max_steps=2")
    assert load_recipe(folder / "recipe.yaml").model.name == began != f"{base}@{served.head(REPO)}"
    with pytest.raises(UserError, match=r"belongs to another run: model\.name was"):
        train(folder, f"{base}@{served.head(REPO)}", "training.max_steps=2")


def test_an_adapter_on_a_published_model_loads_the_way_its_card_says(served, call, tmp_path):
    lora = "lora={r: 4, target_modules: [c_attn], fan_in_fan_out: true}"
    run = train(tmp_path / "on" / "run", f"hub:{REPO}/{S}", lora)
    assert call(publish, run, "publish.subfolder=chapter06/on").code == 0
    card = served.read(REPO, "chapter06/on/README.md").decode()
    script = tmp_path / "card.py"
    script.write_text(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
    loaded = runpy.run_path(str(script))
    adapter = load_file(run / "adapter_model.safetensors")
    state = loaded["model"].state_dict()
    assert all(
        torch.equal(w, state[n.replace(".weight", ".default.weight")]) for n, w in adapter.items()
    )


def test_an_adapter_that_training_continues_names_its_own_base(hub, call, runs, tmp_path):
    """Which is not there, so far from the Hub."""
    run = copied(runs["lora"], tmp_path / "run")
    assert call(publish, run, "--unasked", "publish.base_model=elith/tiny-base").code == 0
    settings = ["model.from_scratch=null", f"model.name=hub:{REPO}/{S}"]
    settings += [f"training.output_dir={tmp_path / 'tuned'}"]
    done = call(sft, "recipes/quickstart.yaml", *settings)
    assert "model.name: elith/tiny-base has no config" in error_of(done)


@pytest.mark.parametrize(
    "name", ["hub:elith/llm-book-models", "hub:a/b/../c", "hub:a/b/c@", "hub:a/b//c"]
)
def test_an_address_of_another_form_is_refused_with_its_place(name, call):
    done = call(sft, "recipes/quickstart.yaml", "model.from_scratch=null", f"model.name={name}")
    line = error_of(done)
    assert "model" in line and "expected" in line


def test_a_pulled_recipe_trains_the_same_again_and_names_what_differs(
    hub, call, tmp_path, monkeypatch
):
    recipe, output = "recipes/quickstart.yaml", tmp_path / "first"
    fast = [
        "training.max_steps=8",
        "training.save_strategy=no",
        "generation.prompts=[]",
        "training.report_to=none",
    ]
    place = [f"publish={{repo: {REPO}, subfolder: {S}}}"]
    assert call(sft, recipe, f"training.output_dir={output}", *fast, *place).code == 0
    assert call(publish, output, "--unasked").code == 0
    pulled(call, folder=tmp_path / "pulled")
    again = call(
        sft, tmp_path / "pulled" / "recipe.yaml", f"training.output_dir={tmp_path / 'again'}"
    )
    assert again.code == 0 and "not as published" not in again.out
    first, second = (
        load_file(folder / "model.safetensors") for folder in (output, tmp_path / "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)

    monkeypatch.setattr(
        "finetuning.launch.software.installed",
        lambda package: "9.9" if package == "torch" else None,
    )
    changed = [
        "data.where={prompt: What is the capital of Japan?}",
        "data.eval=null",
        "training.eval_strategy=no",
    ]
    done = call(
        sft,
        tmp_path / "pulled" / "recipe.yaml",
        f"training.output_dir={tmp_path / 'other'}",
        *changed,
    )
    assert "not as published: the data is not the same" in done.out
    assert f"not as published: torch was {torch.__version__}, is 9.9" in done.out
