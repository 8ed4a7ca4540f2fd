"""manifest.json: what it records, and what it is compared with."""

import json

import pytest
from run_folders import retrained

from finetuning.errors import UserError
from finetuning.hub.manifest import Losses, parse_manifest
from finetuning.launch.software import versions
from finetuning.publishing.provenance import (
    changed_settings,
    describe_run,
    evaluation_losses,
    unlike_published,
)
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.folder import RunFolder


@pytest.fixture
def manifest(runs):
    run = RunFolder(runs["full"])
    return describe_run(run, run.recipe, "full")


def test_it_records_what_the_run_was_made_of(manifest, runs):
    environment = json.loads((runs["full"] / "environment.json").read_text())
    assert manifest.data.fingerprint == environment["data"] and manifest.versions == versions()
    assert manifest.recipe["training"]["learning_rate"] == 0.01
    assert parse_manifest(manifest.as_text()) == manifest


def test_the_launch_command_stays_out_of_it(manifest):
    assert "arguments" not in manifest.as_text() and "launch" not in manifest.as_text()


def test_losses_are_the_first_and_the_last():
    logged = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "loss": 9.0},
        {"eval_loss": 2.0},
        {"eval_loss": 1.0},
    ]
    assert evaluation_losses(logged) == Losses(before=3.0, after=1.0)
    assert evaluation_losses([{"loss": 1.0}]) is None


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"made_by": "others"}', '{"made_by": "finetuning-recipes"}', "{"]
)
def test_other_files_of_that_name_are_no_manifest(text):
    assert parse_manifest(text) is None


def test_what_decides_the_training_is_compared_and_where_it_ran_is_not(manifest, runs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text((runs["full"] / "recipe.yaml").read_text())
    retrained(run, training__output_dir="x", publish__subfolder="y", generation__max_new_tokens="3")
    assert (
        changed_settings(
            manifest, describe_run(RunFolder(run), load_recipe(run / "recipe.yaml"), "full")
        )
        == []
    )
    retrained(run, data__max_length="64", training__seed="7")
    changed = changed_settings(
        manifest, describe_run(RunFolder(run), load_recipe(run / "recipe.yaml"), "full")
    )
    assert changed == ["data.max_length was 128, is 64", "training.seed was None, is 7"]


def test_a_recipe_is_compared_with_the_manifest_beside_it(manifest, tmp_path):
    recipe, data = tmp_path / "recipe.yaml", manifest.data.fingerprint
    assert unlike_published(recipe, "any", {}) == []
    (tmp_path / "manifest.json").write_text(manifest.as_text())
    assert unlike_published(recipe, data, versions()) == []
    found = unlike_published(recipe, "other", {**versions(), "torch": "9.9", "peft": None})
    assert found[0].startswith("the data is not the same")
    assert (
        found[1] == f"torch was {versions()['torch']}, is 9.9"
        and "peft was" in found[2]
        and len(found) == 3
    )
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not a manifest of a published model"):
        unlike_published(recipe, data, versions())
