"""Recipes as text: the repository's own, and small ones of every kind."""

import json
from pathlib import Path

import jsonschema
import pytest
from commands import ROOT
from pages import listed_recipes

from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.recipe.schema import SCHEMA

RECIPES = [ROOT / "recipes" / name for name in listed_recipes()]
TEXT = """\
model: {name: some/model}
data: {path: rows.jsonl, reader: dolly, template: plain_chat}
training: {output_dir: out}
"""
MIXED = """\
model: {name: some/model}
data:
  path:
    - {path: a.jsonl, weight: 0.5}
    - {path: b.json, reader: sharegpt, where: {lang: ja}}
  reader: dolly
  template: plain_chat
  eval: {fraction: 0.1, seed: 3}
lora: {r: 8, target_modules: [c_attn]}
training: {output_dir: out, eval_strategy: no, report_to: [tensorboard, wandb]}
generation: {prompts: ["首都は？", "no"], temperature: 0.7}
publish: {repo: me/models, subfolder: a/b}
"""

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def load_text(folder: Path, text: str, *overrides: str) -> Recipe:
    """The recipe of a text, with overrides."""
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


def schema_validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)
