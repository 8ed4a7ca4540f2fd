"""Every field of every section x odd values: refused in one line, or right, and never a
traceback."""

import copy
import json
from typing import Any

import pytest
from commands import RECIPE, ROWS, write_files
from pydantic import ValidationError
from ruamel.yaml import YAML

import sft
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


@pytest.mark.parametrize("section", SECTIONS)
def test_an_odd_value_is_refused_in_one_line_or_right(section, call, tmp_path):
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    settings = YAML(typ="safe", pure=True).load(tmp_path / "recipe.yaml")
    cases = odd_recipes(section)
    passed = [case for case in cases if is_valid(with_value(settings, *case))]
    assert len(passed) < len(cases)  # some are refused before a library is asked
    for place, value in passed:
        if place in PLACES and value:
            continue
        override = f"{place}={json.dumps(value)}"
        checked = call(sft, "--check", tmp_path / "recipe.yaml", override)
        said = checked.out + checked.err
        assert "Traceback" not in said, f"{override}: {said}"
        assert checked.code in (0, 2), f"{override}: {said}"
        if checked.code == 2:
            assert checked.err.splitlines()[-1].startswith("error: "), override
