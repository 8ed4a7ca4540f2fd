"""Every field of every section x odd values: refused in one line, or right, and never a
traceback."""

import copy
import json
from typing import Any

import pytest
from commands import RECIPE, ROWS, forks, write_files
from pydantic import ValidationError
from ruamel.yaml import YAML

from finetuning.recipe.error_messages import explain, section_at
from finetuning.recipe.recipe import Recipe

ODD = (
    *(None, True, "", " ", "nonsense", "日本", -1, 0, 1, 3, 0.5, 10**12, 2**64, 1e30),
    *(float("nan"), float("inf"), [], [1], [""], ["nonsense"], [[1, 2]], [None], {}),
    *({"nonsense": 1}, {"use_reentrant": True}, {"": None}),
)
SECTIONS = ("model", "model.from_scratch", "data", "data.eval", "lora", "training", "generation")
# Where a run is written to, and what it reads: an odd name is a right one.
PLACES = {"training.output_dir", "data.path", "model.name"}


def odd_recipes(section: str) -> list[tuple[str, Any]]:
    fields = section_at(Recipe.model_fields, tuple(section.split(".")))
    return [(f"{section}.{name}", value) for name in fields for value in ODD]


def is_valid(settings: dict[str, Any]) -> bool:
    """Whether the recipe is right as far as pydantic says; what it refuses becomes one line."""
    try:
        Recipe.model_validate(settings)
        return True
    except ValidationError as error:
        line = explain(error, Recipe.model_fields, settings, {}, "recipe.yaml")
        assert line.startswith("recipe.yaml: ")
        assert "\n" not in line
        return False


def with_value(settings: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(settings)
    *sections, name = place.split(".")
    inner = changed
    for section in sections:
        if inner.get(section) is None:
            inner[section] = {}
        inner = inner[section]
    inner[name] = value
    return changed


@pytest.fixture(scope="module")
def run_check():
    modules = ("finetuning.training.check", "peft", "finetuning.data.cache")
    with forks(*modules, HF_HUB_OFFLINE="1", WANDB_MODE="offline") as run:
        yield lambda *arguments: run("sft.py", "--check", *arguments)


@pytest.mark.parametrize("section", SECTIONS)
def test_an_odd_value_is_refused_in_one_line_or_right(section, run_check, tmp_path):
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    settings = YAML(typ="safe", pure=True).load(tmp_path / "recipe.yaml")
    cases = odd_recipes(section)
    passed = [case for case in cases if is_valid(with_value(settings, *case))]
    assert len(passed) < len(cases)  # some are refused before a library is asked
    for place, value in passed:
        if place in PLACES and value:
            continue
        override = f"{place}={json.dumps(value)}"
        process = run_check(str(tmp_path / "recipe.yaml"), override)
        said = process.stdout + process.stderr
        assert "Traceback" not in said, f"{override}: {said}"
        assert process.returncode in (0, 2), f"{override}: {said}"
        if process.returncode == 2:
            assert process.stderr.splitlines()[-1].startswith("error: "), override
