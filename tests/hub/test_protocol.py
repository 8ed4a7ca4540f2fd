"""A hostile Hub, or a mirror, or whoever sits on the line: nothing of its answers acts here."""

import gzip
import json
import re

import pytest
from conftest import ROOT
from hub_server import OWNER, REPO
from huggingface_hub import constants
from run_folders import error_of, files_below
from safetensors.numpy import save

import preview
import pull
from finetuning.errors import UserError
from finetuning.hub import protocol

UP = "../" * 8
FILES = {"m/config.json": b"{}", "m/model.safetensors": save({})}


@pytest.fixture
def outside(tmp_path):
    """Files that were there before, and that nothing may change or join."""
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "victim").write_text("mine")
    return lambda: {
        path: content
        for path, content in files_below(tmp_path).items()
        if not path.startswith(("home/hub/", "hub/"))
    }


@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", [f'"{UP}victim"', f'"{UP}new"', '"x/y"', 'W/".."', "a" * 39])
def test_a_header_that_is_no_digest_becomes_no_path(header, value, hub, call, outside, tmp_path):
    """huggingface_hub 2.4.0 joins it to the path of its cache, and --force overwrites what is
    there."""
    hub.put(REPO, FILES)
    before = outside()
    value = value.replace("victim", str(tmp_path / "victim").lstrip("/"))
    hub.fault(f"/{REPO}/resolve/", times=99, lies={header: value})
    line = error_of(call(pull, REPO, "m"))
    assert f"({header}), which is not a digest; refused" in line
    assert outside() == before


def test_a_cached_file_that_is_a_link_out_of_the_cache_is_not_overwritten(
    hub, call, outside, tmp_path
):
    hub.put(REPO, FILES)
    assert call(pull, REPO, "m").code == 0
    before = outside()
    cached = next((tmp_path / "home").rglob("m/config.json"))
    cached.unlink()
    cached.symlink_to(tmp_path / "victim")
    assert "outside the cache; delete it" in error_of(call(pull, REPO, "m"))
    assert outside() == before


def test_a_file_is_not_read_further_than_the_hub_listed_it(hub, call):
    hub.put(REPO, FILES)
    hub.fault(f"GET /{REPO}/resolve/", times=99, says=b"x" * 2**21)
    assert "more than the" in error_of(call(pull, REPO, "m"))


def test_pages_without_end_come_to_an_end(hub, call, monkeypatch):
    monkeypatch.setattr("finetuning.hub.client.MAX_ANSWER", 20 * protocol.MIN_COST)
    link = f"<{hub.url}/api/models/{REPO}/tree/main?page>; rel=next"
    hub.fault("/tree/", times=10_000, says=[], lies={"Link": link})
    assert "more than the 1,310,720 bytes" in error_of(call(pull, REPO, "m"))
    assert len(hub.sent("/tree/")) <= 20


def test_the_next_page_is_asked_of_the_same_host_only(hub, call):
    """The client sends its token along."""
    hub.put(REPO, FILES)
    link = f"<{hub.cdn}/stolen>; rel=next"
    hub.fault("/tree/", times=99, lies={"Link": link})
    assert "its next page on another host" in error_of(call(pull, REPO, "m"))
    assert not hub.sent("stolen")


def test_a_compressed_answer_is_not_unpacked(hub, call):
    bomb = gzip.compress(b" " * 10**7)
    hub.fault("/tree/", times=99, says=bomb, lies={"Content-Encoding": "gzip"})
    assert "compressed answer that was not asked for" in error_of(call(pull, REPO, "m"))


ODD = {
    "no commit": ("/revision/main", {"id": REPO, "sha": None, "siblings": []}),
    "a number": ("/revision/main", {"id": REPO, "sha": 7, "siblings": []}),
    "a path": ("/revision/main", {"id": REPO, "sha": f"{UP}victim", "siblings": []}),
    "a list": ("/revision/main", [1]),
    "not JSON": ("/revision/main", b"<html>"),
    "deep JSON": ("/revision/main", b"[" * 100_000),
    "tree of numbers": ("/tree/", [1, 2]),
    "tree of nothing": ("/tree/", [{}]),
    "tree not JSON": ("/tree/", b"\xff"),
    "tree of text": ("/tree/", {"a": "b"}),
    "path up": ("/tree/", [{"type": "file", "path": "m/../../x", "oid": "0" * 40, "size": 1}]),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_answer_is_one_line(case, hub, call, outside):
    before, (match, answer) = outside(), ODD[case]
    hub.put(REPO, FILES)
    hub.fault(match, times=99, says=answer)
    assert OWNER not in error_of(call(pull, REPO, "m"))
    assert outside() == before


@pytest.mark.parametrize("target", ["http://[", "file:///etc/passwd", "http://127.0.0.1:9/x", ""])
def test_an_odd_redirect_is_one_line(target, hub, call):
    hub.fault("/revision/main", times=99, status=302, headers={"Location": target})
    error_of(call(pull, REPO, "m"))


def test_what_the_hub_says_cannot_act_on_a_terminal(hub, call):
    said = "no\x9b31m \x1b]52;c;eA==\x07 \u202e way"
    hub.fault("/revision/main", times=99, says={"error": said}, status=400)
    hub.fault("/revision/main", times=99, status=400, headers={"X-Error-Message": "\x1b[2Jx"})
    done = call(pull, REPO, "m")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.err + done.out)


def test_an_allowance_is_counted_over_answers():
    with protocol.at_most(10):
        protocol.ALLOWANCE.get().take(9)
        with pytest.raises(UserError, match="more than the 10 bytes"):
            protocol.ALLOWANCE.get().take(2)
    assert protocol.ALLOWANCE.get() is None


def test_the_address_of_a_mirror_does_not_show_its_password(hub, call, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://ada:correct-horse@127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", constants.ENDPOINT)
    line = error_of(call(pull, REPO, "m"))
    assert "correct-horse" not in line and "127.0.0.1:9" in line
    assert json.dumps(line)


def test_a_base_model_that_a_library_fetches_is_checked_too(hub, call, outside, tmp_path):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    hub.put(REPO, dict.fromkeys(names, b"{}"))
    before, victim = outside(), str(tmp_path / "victim").lstrip("/")
    hub.fault("/resolve/", times=99, lies={"ETag": f'"{UP}{UP}{victim}"'})
    rows = f"data.path={ROOT / 'recipes/data/quickstart.jsonl'}"
    base = ["model.from_scratch=null", f"model.name={REPO}"]
    done = call(
        preview,
        ROOT / "recipes/quickstart.yaml",
        rows,
        *base,
        f"training.output_dir={tmp_path / 'run'}",
    )
    assert "(ETag), which is not a digest; refused" in error_of(done)
    assert outside() == before
