"""A run folder is empty, or one of ours, or refused with what is in it; a stranger does not choose
it."""

import json
import os
import re
import subprocess

import pytest
from conftest import ROOT
from run_folders import error_of

import preview
import sft

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
DATA = f"data.path={ROOT / 'recipes/data/quickstart.jsonl'}"


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [".docker", ".ssh", "repository", "home"])
@pytest.mark.parametrize("script", [(sft, "--check"), (sft,), (preview,)])
def test_a_folder_with_files_of_others_is_refused(name, script, call, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text('{"auths": "mine"}')
    (folder / "README.md").write_text("mine")
    before, (module, *flags) = files_of(tmp_path), script
    done = call(module, QUICKSTART, DATA, f"training.output_dir={folder}", *flags)
    line = error_of(done)
    assert f"{folder} is not a run folder: it holds README.md and 1 more" in line
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("place", ["/", "'~'", ".", str(ROOT)])
def test_the_places_that_everybody_has_are_refused(place, call, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(ROOT))
    done = call(sft, "--check", QUICKSTART, f"training.output_dir={place}")
    assert re.search("it holds|holds a link", error_of(done))


def test_a_link_in_a_run_folder_is_not_written_through(call, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "victim").write_text("mine")
    (folder / "samples.md").symlink_to(tmp_path / "victim")
    done = call(sft, "--check", QUICKSTART, DATA, f"training.output_dir={folder}")
    assert "holds a link, samples.md" in error_of(done)


@pytest.fixture
def pulled_recipe(tmp_path):
    """A function: output folder -> a recipe of a stranger that names it, with its manifest."""

    def write(output: str):
        text = QUICKSTART.read_text(encoding="utf-8")
        (tmp_path / "recipe.yaml").write_text(
            text.replace("outputs/quickstart", json.dumps(output)), encoding="utf-8"
        )
        (tmp_path / "manifest.json").write_text("{}")
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize("output", ["~/.docker", "/tmp/new", "../x", "a/../../x", ".git/hooks"])
@pytest.mark.parametrize("script", [(sft, "--check"), (sft,), (preview,)])
def test_a_pulled_recipe_does_not_choose_a_folder_elsewhere(output, script, pulled_recipe, call):
    module, *flags = script
    line = error_of(call(module, pulled_recipe(output), DATA, *flags))
    assert "is chosen by a recipe that was pulled" in line


def test_the_person_may_choose_any_folder_for_a_pulled_recipe(pulled_recipe, call, tmp_path):
    done = call(sft, "--check", pulled_recipe("~/x"), DATA, f"training.output_dir={tmp_path / 'n'}")
    assert "is chosen by" not in done.err


def test_pulling_deletes_nothing_beside_the_target(tmp_path):
    from finetuning.hub.address import Address
    from finetuning.hub.snapshot import Snapshot, copy_snapshot

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_text("{}")
    (tmp_path / ".mine.tmp").mkdir()
    (tmp_path / ".mine.tmp" / "thesis").write_text("years")
    names = ["config.json"]
    snapshot = Snapshot(Address("a/b", "c"), tmp_path / "cache", names, None, [], [])
    copy_snapshot(snapshot, tmp_path / "mine")
    assert (tmp_path / ".mine.tmp" / "thesis").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "cache", "mine"]
    umask = subprocess.run(["sh", "-c", "umask"], capture_output=True, text=True).stdout
    assert (os.stat(tmp_path / "mine").st_mode & 0o777) == 0o777 & ~int(umask, 8)
