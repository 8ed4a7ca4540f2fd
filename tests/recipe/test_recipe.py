"""A recipe is read as written, typed and whole."""

import copy
import dataclasses
import json
import re
from functools import partial
from typing import get_args

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from recipe_texts import MIXED, RECIPES, TEXT, every_recipe, load_text, schema_validator
from ruamel.yaml import YAML

from finetuning.errors import UserError
from finetuning.launch.step_size import step_size
from finetuning.recipe import library_fields
from finetuning.recipe.bounds import BOUNDS
from finetuning.recipe.error_messages import members_of
from finetuning.recipe.library_sections import (
    GenerationConfigFields,
    LoraConfigFields,
    SFTConfigFields,
)
from finetuning.recipe.ownership import OWNED, PREFERENCE_KEYS, RENAMED
from finetuning.recipe.recipe import PreferenceRecipe, Recipe, load_recipe
from finetuning.recipe.sections import PreferenceTraining
from finetuning.section import Section


@pytest.fixture
def load(tmp_path):
    return partial(load_text, tmp_path)


@pytest.fixture(scope="module")
def validator():
    return schema_validator()


def sections_of(section):
    """The section and all sections in it, with their names."""
    found = [section]
    for _, value in section:
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Section):
                found += sections_of(inner)
    return found


# Reading


def test_a_number_with_an_exponent_is_a_number_in_file_and_override(load):
    in_file = load(
        TEXT.replace("output_dir: out", "output_dir: out, learning_rate: 2e-5, weight_decay: 1E0")
    )
    assert (in_file.training.learning_rate, in_file.training.weight_decay) == (2e-5, 1.0)
    assert load(TEXT, "training.learning_rate=2e-5").training.learning_rate == 2e-5


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "n", "12:30"])
def test_text_that_old_yaml_took_for_something_else_stays_text(load, word):
    assert load(TEXT.replace("rows.jsonl", word)).data.path == word
    assert load(TEXT, f"data.path={word}").data.path == word


def test_no_as_a_strategy_is_the_library_s_choice_no(load):
    assert load(MIXED).training.eval_strategy == "no"
    assert load(TEXT, "training.eval_strategy=no").training.eval_strategy == "no"


def test_true_and_false_are_no_text_and_whole_numbers_are_numbers(load):
    recipe = load(TEXT, "training.bf16=true", "training.learning_rate=1", "training.max_steps=10")
    assert recipe.training.bf16 is True
    assert recipe.training.learning_rate == 1
    assert recipe.training.max_steps == 10


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TEXT + "data: {path: b}\n", 4),
        (
            TEXT.replace("{output_dir: out}", "\n  output_dir: a\n  max_steps: 1\n  output_dir: b"),
            6,
        ),
        (MIXED.replace("reader: sharegpt", "reader: sharegpt, reader: dolly"), 5),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(load, tmp_path, text, line):
    with pytest.raises(UserError, match="found duplicate key") as caught:
        load(text)
    assert str(caught.value).startswith(f"{tmp_path}/recipe.yaml:{line}: ")


def test_the_place_of_a_problem_is_file_and_line_or_the_override(load, tmp_path):
    with pytest.raises(UserError) as caught:
        load(MIXED.replace("weight: 0.5", "weight: heavy"))
    assert (
        str(caught.value)
        == f'{tmp_path}/recipe.yaml:4: data.path.0.weight is "heavy"; expected a number'
    )
    with pytest.raises(UserError) as caught:
        load(MIXED, "data.path=[{path: a, weight: heavy}]")
    assert str(caught.value).startswith(
        "override 'data.path=[{path: a, weight: heavy}]': data.path.0.weight is "
    )


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TEXT, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "recipe.yaml").model.name == "some/model"


# Overrides


# The recipe as a value


@every_recipe
def test_every_recipe_is_the_same_after_saving_and_loading(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "saved.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == recipe
    assert again.resolved() == recipe.resolved()
    assert again.as_yaml() == recipe.as_yaml()


def test_a_recipe_with_every_section_is_the_same_after_saving_and_loading(load):
    recipe = load(MIXED)
    again = load(recipe.as_yaml())
    assert again == recipe
    assert again.resolved() == recipe.resolved()
    assert again.data.sources == recipe.data.sources


def test_a_long_text_with_tabs_is_the_same_after_saving_and_loading(load):
    text = (
        "東京東京worda\t\tword\t東京東京東京"
        "word東京aaword\ta\tword\t東京東京\t\t\t東京  a\t\t東京東京\t \t\ta 東京a"
    )
    recipe = load(MIXED, f"generation.prompts={json.dumps([text])}")
    assert recipe.generation.prompts == [text]
    assert load(recipe.as_yaml()) == recipe


def test_saved_text_keeps_its_letters_and_its_order(load):
    saved = load(MIXED).as_yaml()
    assert "首都は？" in saved
    found = re.findall(r"^(\w+):", saved, re.MULTILINE)
    assert found == [name for name in Recipe.model_fields if name in found]
    assert {"model", "data", "lora", "training", "generation", "publish"} <= set(found)


@pytest.mark.parametrize("text", [MIXED, *(path.read_text(encoding="utf-8") for path in RECIPES)])
def test_a_recipe_is_frozen_at_every_depth(load, text):
    sections = sections_of(load(text))
    assert len(sections) >= 5
    for section in sections:
        for name, value in section:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, value)


def test_what_a_recipe_resolves_to_can_be_changed_without_changing_the_recipe(load):
    recipe = load(MIXED)
    before = copy.deepcopy(recipe.resolved())
    resolved = recipe.resolved()
    resolved["data"]["path"][1]["where"]["lang"] = "en"
    resolved["generation"]["prompts"].append("another")
    resolved["lora"]["target_modules"].clear()
    assert recipe.resolved() == before


def test_resolved_names_our_defaults_and_only_the_given_settings_of_the_libraries(load):
    resolved = load(TEXT).resolved()
    assert list(resolved) == ["model", "data", "training", "publish"]
    assert resolved["training"] == {"output_dir": "out"}
    assert resolved["publish"] is None
    assert resolved["model"]["dtype"] == "auto"
    assert (resolved["data"]["max_length"], resolved["data"]["overflow"]) == (512, "drop")
    assert resolved["data"]["eval"] is None
    assert json.loads(json.dumps(resolved)) == resolved


def test_resolved_keeps_what_was_given_though_it_is_the_library_s_default(load):
    default = SFTConfigFields.model_fields["learning_rate"].default
    recipe = load(TEXT, f"training.learning_rate={default}", "generation.max_new_tokens=128")
    assert recipe.resolved()["training"] == {"output_dir": "out", "learning_rate": default}
    assert recipe.resolved()["generation"] == {"max_new_tokens": 128}


def test_resolved_names_of_a_mixed_source_only_what_it_sets_apart(load):
    assert load(MIXED).resolved()["data"]["path"] == [
        {"path": "a.jsonl", "weight": 0.5},
        {"path": "b.json", "reader": "sharegpt", "where": {"lang": "ja"}},
    ]


def test_a_mixed_source_takes_from_the_data_section_what_it_does_not_set_apart(load):
    first, second = load(MIXED, "data.where={lang: en}", "data.split=half").data.sources
    assert (first.reader, first.weight, first.where, first.split) == (
        "dolly",
        0.5,
        {"lang": "en"},
        "half",
    )
    assert (second.reader, second.weight, second.where, second.split) == (
        "sharegpt",
        1.0,
        {"lang": "ja"},
        "half",
    )


@every_recipe
def test_every_recipe_has_the_same_step_on_any_number_of_gpus(path):
    recipe = load_recipe(path)
    assert {step_size(recipe, processes).total for processes in (1, 2, 4, 8)} == {
        recipe.training.global_batch_size
    }


def test_the_sections_of_the_libraries_are_those_of_the_installed_ones():
    fields = library_fields.read_library_fields()
    for section, found in fields.items():
        assert set(BOUNDS[section]) <= set(found)
    expected = library_fields.library_sections(fields)
    assert library_fields.FILE.read_text(encoding="utf-8") == expected, "run: make schema"


LIBRARY_SECTIONS = {
    "training": SFTConfigFields,
    "lora": LoraConfigFields,
    "generation": GenerationConfigFields,
}


def own_settings():
    """(section, name, description) of every setting that is ours and not a library's word for
    word."""
    sections = [Section]
    for section in sections:
        sections += section.__subclasses__()
        if section in LIBRARY_SECTIONS.values():
            continue
        theirs = LIBRARY_SECTIONS.get(section.__name__.lower(), Section).model_fields
        for name, field in section.model_fields.items():
            if name not in theirs or field.description != theirs[name].description:
                yield section.__name__, name, field.description


def test_every_setting_of_our_own_says_what_it_is():
    settings = list(own_settings())
    found = {f"{section}.{name}" for section, name, _ in settings}
    assert {
        "Recipe.model",
        "Eval.every",
        "Source.weight",
        "Training.output_dir",
        "Generation.prompts",
    } <= found
    assert "Training.max_steps" not in found
    assert [f"{section}.{name}" for section, name, description in settings if not description] == []


def test_every_number_of_a_recipe_has_bounds():
    found = {
        f"{section.__name__}.{name}": is_bounded(field)
        for section in all_sections()
        for name, field in section.model_fields.items()
        if {int, float} & set(members_of(field.annotation))
    }
    assert len(found) > 70
    assert [name for name, is_right in found.items() if not is_right] == []


def all_sections():
    found = {Section}
    while more := {inner for section in found for inner in section.__subclasses__()} - found:
        found |= more
    return found


def is_bounded(field):
    """Whether a field, or the numbers in the union that it is, have bounds on both sides."""
    inner = [entry for member in members_of(field.annotation) for entry in get_args(member)[1:]]
    limits = [
        *field.metadata,
        *(limit for entry in inner for limit in getattr(entry, "metadata", [])),
    ]
    found = {type(limit) for limit in limits} & {Ge, Gt, Le, Lt}
    return found in ({Ge, Le}, {Gt, Le}, {Ge, Lt}, {Gt, Lt})


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_nan_and_infinity_are_refused(load, number):
    with pytest.raises(
        UserError, match=r"learning_rate is -?(NaN|Infinity); expected a finite number"
    ):
        load(TEXT, f"training.learning_rate={number}")


def test_keys_that_another_section_owns_are_keys_of_the_libraries():
    from peft import LoraConfig
    from transformers import GenerationConfig
    from trl import DPOConfig, SFTConfig

    configs = (SFTConfig, DPOConfig)
    keys = {
        "training": {field.name for config in configs for field in dataclasses.fields(config)},
        "lora": {field.name for field in dataclasses.fields(LoraConfig)},
        "generation": set(GenerationConfig().to_dict()),
    }
    for section, owned in OWNED.items():
        assert set(owned) <= keys[section], section


def test_the_new_name_of_a_renamed_key_is_a_setting():
    settings = {
        f"{name}.{key}"
        for name, field in Recipe.model_fields.items()
        for key in keys_of(field.annotation)
    }
    assert {"data.max_length", "lora.r", "publish.repo"} <= settings
    for old, new in RENAMED.items():
        named = re.findall(r"\b(?:model|data|lora|training|generation|publish)\.\w+", new)
        assert set(named) <= settings, old


def keys_of(annotation):
    members = [annotation, *getattr(annotation, "__args__", ())]
    return [
        key
        for m in members
        if isinstance(m, type) and issubclass(m, Section)
        for key in m.model_fields
    ]


PAIRS = """
model: {name: some/model}
data: {path: pairs.jsonl, reader: preference, template: question_answer}
training: {output_dir: out, beta: 0.05, loss_type: [sigmoid, sft], loss_weights: [1, 0.2]}
"""


def test_a_recipe_of_pairs_takes_the_settings_of_dpo_config(load, validator):
    recipe = load(PAIRS)
    assert isinstance(recipe, PreferenceRecipe) and recipe.script == "src/dpo.py"
    assert recipe.training.beta == 0.05 and recipe.training.learning_rate == 1e-6
    assert load(recipe.as_yaml()) == recipe
    read = YAML(typ="safe", pure=True).load
    validator.validate(read(PAIRS))
    in_list = PAIRS.replace("pairs.jsonl, reader: preference", "[{path: a, reader: hh_rlhf}]")
    validator.validate(read(in_list))
    assert isinstance(load(in_list), PreferenceRecipe)


def test_the_settings_of_pairs_are_dpo_configs_by_name_and_default():
    from trl import DPOConfig

    theirs = {field.name: field for field in dataclasses.fields(DPOConfig)}
    ours = PreferenceTraining.model_fields
    assert set(PREFERENCE_KEYS) == PreferenceTraining.__annotations__.keys() - {"learning_rate"}
    for name in {*PREFERENCE_KEYS, "learning_rate"} - {"loss_type"}:
        assert ours[name].default == theirs[name].default, name
    assert theirs["loss_type"].default_factory() == [ours["loss_type"].default]


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("beta:", "betta:", r"unknown key training.betta; did you mean training.beta\?"),
        ("reader: preference", "reader: dolly", "training.beta belongs to recipes of src/dpo.py"),
        ("beta: 0.05", "use_weighting: true", "training.use_weighting belongs to the loss"),
        ("beta: 0.05", "sync_ref_model: true", "sync_ref_model belongs to the reference"),
        (
            "beta: 0.05",
            "precompute_ref_log_probs: true",
            "precompute_ref_log_probs belongs to the reference",
        ),
        ("[sigmoid, sft]", "[apo, sft]", 'is "apo"; allowed are sigmoid, hinge'),
        ("[sigmoid, sft]", "[aot, sft]", "loss_type: aot is not supported: it sorts the pairs"),
        ("[sigmoid, sft]", "kto", "loss_type: kto is not supported: it compares with"),
        ("reader: preference", "reader: kto", 'data.reader is "kto"; allowed are'),
        ("[1, 0.2]", "[1]", "loss_weights: 1 of them for 2 of loss_type"),
        ("[sigmoid, sft]", "[exo_pair, sft]", "label_smoothing: above 0 with loss_type exo_pair"),
        ("beta: 0.05", "label_smoothing: 0.5, f_divergence_type: js_divergence", None),
        (
            "[sigmoid, sft]",
            "[nca_pair, sft], f_divergence_type: js_divergence",
            "f_divergence_type: js_divergence does not go with loss_type nca_pair",
        ),
        ("beta: 0.05", "max_length: 5", "training.max_length belongs to data.max_length"),
    ],
)
def test_what_a_recipe_of_pairs_cannot_have_is_refused_by_name(load, right, wrong, problem):
    assert PAIRS.count(right) == 1
    if problem is None:
        load(PAIRS.replace(right, wrong))
        return
    with pytest.raises(UserError, match=problem):
        load(PAIRS.replace(right, wrong))
