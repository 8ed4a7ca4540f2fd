"""Fuzz: names, manifests, recipes and answers of a server that mean harm.

Whatever they are: no file is written outside, no traceback ends a script, and no control character
reaches an output.
"""

import json
import re

import pytest
from conftest import ROOT
from hub_server import REPO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import error_of, files_below
from safetensors.numpy import save

import pull
from finetuning.errors import UserError, one_line
from finetuning.hub.address import parse_address
from finetuning.hub.manifest import parse_manifest
from finetuning.publishing.repository_card import BEGIN, END, repository_card
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.output_folder import (
    make_folder,
    output_folder,
    require_free_or_ours,
    require_local_output,
)
from finetuning.untrusted_text import cell, code_cell, inline, printable

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
UGLY = st.text(
    st.sampled_from("ab/.~\\ \n\r\t\x1b\x9b\u202e|`<>[]()#!&*_@:-=\"'{}%\x00é日"), max_size=40
)
TEXT = st.one_of(UGLY, st.text(max_size=30))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
few = settings(fuzz, max_examples=15)


@fuzz
@given(TEXT)
def test_no_text_acts_on_a_terminal_or_in_a_document(text):
    for shown in (printable(text), cell(text), inline(text), code_cell(text)):
        assert not ACTS.search(shown)
    assert "\n" not in cell(text) + inline(text) + code_cell(text)


@fuzz
@given(TEXT)
def test_no_address_leads_out_of_a_folder(text):
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert not {"", ".", ".."} & set(address.subfolder.split("/"))
    assert parse_address(str(address)) == address


WHOLE = {
    "made_by": "finetuning-recipes",
    "kind": "full",
    "base": {"name": "a/b", "subfolder": None, "revision": None},
    "data": {"path": ["x"], "datasets": ["a/b"], "fingerprint": None},
    "losses": {"before": 1.0, "after": 1.0},
    "versions": {"torch": "2"},
    "finished": None,
    "recipe": {},
    "files": {},
}


@fuzz
@given(st.sampled_from([*WHOLE, *(f"data.{k}" for k in WHOLE["data"]), "base.name"]), JSON, TEXT)
def test_no_manifest_of_a_neighbour_breaks_the_repositorys_card(place, value, subfolder):
    manifest = json.loads(json.dumps(WHOLE))
    section, _, key = place.partition(".")
    if key:
        manifest[section][key] = [value] if isinstance(value, str) and key != "name" else value
    else:
        manifest[section] = value
    parsed = parse_manifest(json.dumps(manifest))
    if parsed is None:
        return
    card = repository_card("a/b", None, {subfolder: parsed})
    assert not ACTS.search(card)
    assert (card.count(BEGIN), card.count(END)) == (1, 1)
    assert repository_card("a/b", card.encode(), {subfolder: parsed}) == card


KEYS = ["model.name", "data.path", "data.where", "training.output_dir", "training.run_name"]


@fuzz
@given(st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXT), JSON, max_size=4))
def test_no_recipe_ends_in_a_traceback(tmp_path_factory, found):
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe: dict = {"model": {}, "data": {}, "training": {}}
    for name, value in found.items():
        section, _, key = name.partition(".")
        recipe.setdefault(section, {})
        if key and isinstance(recipe[section], dict):
            recipe[section][key] = value
    file.write_text(json.dumps(recipe), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert not ACTS.search(one_line(error.value))


@few
@given(data=st.data())
def test_no_answer_of_a_server_writes_outside_or_ends_in_a_traceback(data, hub, call, tmp_path):
    if not hub.sent("/"):
        hub.put(REPO, {"m/config.json": b"{}", "m/model.safetensors": save({})})
    before = outside(tmp_path)
    hub.faults.clear()
    header = st.sampled_from(["ETag", "X-Linked-ETag", "X-Repo-Commit", "Link", "X-Error-Message"])
    latin = TEXT.filter(lambda text: text.isascii() and text.isprintable())
    for match in data.draw(
        st.lists(st.sampled_from(["revision", "/tree/", "/resolve/"]), max_size=2)
    ):
        if data.draw(st.booleans()):
            hub.fault(match, times=9, lies={data.draw(header): f'"{data.draw(latin)}"'})
        else:
            hub.fault(match, times=9, says=data.draw(JSON))
    done = call(pull, REPO, "m")
    if done.code:
        error_of(done)
    assert not ACTS.search(done.out + done.err)
    assert outside(tmp_path) == before


def outside(folder):
    return {
        path: content
        for path, content in files_below(folder).items()
        if not path.startswith(("home/hub/", "hub/"))
    }


@few
@given(
    st.one_of(UGLY, st.sampled_from(["~/.ssh", "/etc", "..", "a/../../b", ".git/hooks", "\x1b[2J"]))
)
def test_no_pulled_recipe_writes_outside(tmp_path_factory, monkeypatch, output):
    place = tmp_path_factory.mktemp("pulled")
    here = place / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    text = (ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8")
    file = here / "recipe.yaml"
    file.write_text(text.replace("outputs/quickstart", json.dumps(output)), encoding="utf-8")
    (here / "manifest.json").write_text("{}")
    try:
        recipe = load_recipe(file)
        require_local_output(file, recipe, [])
        require_free_or_ours(output_folder(recipe))
        folder = make_folder(output_folder(recipe))
    except UserError:
        return
    assert folder.resolve().is_relative_to(here) and not any(folder.iterdir())
