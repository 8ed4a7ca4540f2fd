"""The schema says to editors what loading a recipe says."""

import json
from functools import partial

import pytest
from recipe_texts import MIXED, every_recipe, load_text, schema_validator
from ruamel.yaml import YAML

from finetuning.errors import UserError
from finetuning.recipe.schema import SCHEMA, recipe_schema


@pytest.fixture
def load(tmp_path):
    return partial(load_text, tmp_path)


@pytest.fixture(scope="module")
def validator():
    return schema_validator()


@every_recipe
def test_every_recipe_names_the_schema_and_fits_it(path, validator):
    first, _ = path.read_text(encoding="utf-8").split("\n", 1)
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert path.with_name("recipe.schema.json") == SCHEMA
    validator.validate(YAML(typ="safe", pure=True).load(path))


def test_the_schema_takes_a_recipe_with_every_section_saved_and_unsaved(load, validator):
    read = YAML(typ="safe", pure=True).load
    validator.validate(read(MIXED))
    validator.validate(read(load(MIXED).as_yaml()))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("training:", "trainning:"),
        ("template:", "tempalte:"),
        ("output_dir: out", "output_dir: out, learnig_rate: 1"),
        ("fraction:", "fractoin:"),
        ("{r: 8", "{rank: 8"),
        ("temperature:", "temprature:"),
        ("weight:", "wieght:"),
        ("plain_chat", "plane_chat"),
        ("r: 8", "r: eight"),
        ("report_to: [tensorboard, wandb]", "packing: true"),
    ],
)
def test_the_schema_refuses_what_loading_refuses(load, validator, right, wrong):
    assert MIXED.count(right) == 1
    text = MIXED.replace(right, wrong)
    assert not validator.is_valid(YAML(typ="safe", pure=True).load(text))
    with pytest.raises(UserError):
        load(text)


def test_the_schema_says_who_owns_a_key_and_what_its_new_name_is():
    definitions = json.loads(SCHEMA.read_text(encoding="utf-8"))["$defs"]
    packing = definitions["Training"]["properties"]["packing"]
    assert packing["errorMessage"] == "training.packing belongs to data.layout"
    renamed = definitions["Training"]["properties"]["evaluation_strategy"]
    assert renamed["errorMessage"].endswith("write training.eval_strategy")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("{name: some/model}", "{name: some/model, from_scratch: {config: {}, vocab_size: 300}}"),
        ("{name: some/model}", "{revision: main}"),
        ("{fraction: 0.1, seed: 3}", "{fraction: 0.1, every: 3}"),
        ("{fraction: 0.1, seed: 3}", "{seed: 3}"),
        ("{r: 8,", "{base_model_name_or_path: x,"),
    ],
)
def test_the_schema_refuses_keys_that_exclude_each_other_or_belong_elsewhere(
    validator, right, wrong
):
    assert MIXED.count(right) == 1
    read = YAML(typ="safe", pure=True).load
    assert validator.is_valid(read(MIXED))
    assert not validator.is_valid(read(MIXED.replace(right, wrong)))


def test_the_schema_file_is_that_of_this_code():
    assert SCHEMA.read_text(encoding="utf-8") == recipe_schema(), "run: make schema"
