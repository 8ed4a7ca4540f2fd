"""The JSON schema of a recipe, by which editors complete and check it; `make schema` writes it."""

import json
from pathlib import Path
from typing import Any

from finetuning.data.preferences import PREFERENCE_READERS
from finetuning.recipe.ownership import OWNED, RENAMED
from finetuning.recipe.recipe import PreferenceRecipe, Recipe

SCHEMA = Path(__file__).parents[3] / "recipes" / "recipe.schema.json"


def recipe_schema() -> str:
    """JSON schema of a recipe, for completion and checking in editors.

    It also has the keys that a section does not take, with what the command line says to them.
    """
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
    }
    schema["$defs"] |= PreferenceRecipe.model_json_schema()["$defs"]
    for section, owned in OWNED.items():
        kinds = [section.capitalize(), *(["PreferenceTraining"] if section == "training" else [])]
        for properties in (schema["$defs"][kind]["properties"] for kind in kinds):
            for name, owner in owned.items():
                properties.setdefault(name, refused(f"{section}.{name} belongs to {owner}"))
            for name, new in RENAMED.items():
                properties.setdefault(name, refused(f"{name} has a new name: write {new}"))
    schema |= training_by_reader(schema["properties"].pop("training"))
    del schema["additionalProperties"]  # which does not know what stands below `then` and `else`
    exclusive = {"Model": ("name", "from_scratch"), "Eval": ("every", "fraction", "split")}
    for section, names in exclusive.items():
        schema["$defs"][section]["oneOf"] = [given(name) for name in names]
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def training_by_reader(training: dict[str, Any]) -> dict[str, Any]:
    """Which keys `training` has, in the schema: those of pairs where the reader reads pairs."""
    reads_pairs = {
        "required": ["reader"],
        "properties": {"reader": {"enum": [*PREFERENCE_READERS]}},
    }
    in_list = {
        "required": ["path"],
        "properties": {"path": {"type": "array", "contains": reads_pairs}},
    }
    of_pairs = {**training, "$ref": "#/$defs/PreferenceTraining"}
    return {
        "if": {"properties": {"data": {"anyOf": [reads_pairs, in_list]}}},
        "then": {"properties": {"training": of_pairs}},
        "else": {"properties": {"training": training}},
        "unevaluatedProperties": False,
    }


def refused(message: str) -> dict[str, Any]:
    """A key that may not be there; editors of the YAML language server show the message."""
    shown = dict.fromkeys(("description", "errorMessage", "deprecationMessage"), message)
    return {"not": {}, "deprecated": True, "doNotSuggest": True, **shown}


def given(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


if __name__ == "__main__":  # make schema
    SCHEMA.write_text(recipe_schema(), encoding="utf-8")
