"""section.key=value replaces one setting of a recipe."""

from functools import partial

import pytest
from recipe_texts import MIXED, TEXT, load_text


@pytest.fixture
def load(tmp_path):
    return partial(load_text, tmp_path)


def test_overrides_are_applied_in_order(load):
    assert load(TEXT, "training.max_steps=1", "training.max_steps=2").training.max_steps == 2
    assert load(MIXED, "lora=null", "lora.r=4").resolved()["lora"] == {"r": 4}
    assert load(MIXED, "lora.r=4", "lora=null").lora is None


def test_an_override_changes_one_key_and_leaves_its_neighbours(load):
    assert load(MIXED, "lora.r=4").resolved()["lora"] == {"r": 4, "target_modules": ["c_attn"]}
    assert load(MIXED, "data.eval.seed=4").data.eval.model_dump(exclude_unset=True) == {
        "fraction": 0.1,
        "seed": 4,
    }


def test_an_override_takes_lists_and_mappings(load):
    recipe = load(
        TEXT,
        "data.path=[{path: a.jsonl}, {path: b.jsonl, weight: 2}]",
        "data.where={lang: en, n: 3}",
        "generation.prompts=[one, 'two, and a half', 三]",
    )
    assert [(source.path, source.weight) for source in recipe.data.sources] == [
        ("a.jsonl", 1.0),
        ("b.jsonl", 2.0),
    ]
    assert recipe.data.where == {"lang": "en", "n": 3}
    assert recipe.generation.prompts == ["one", "two, and a half", "三"]


def test_an_override_creates_the_section_it_names(load):
    assert load(TEXT).lora is None
    assert load(TEXT, "lora.r=8").lora.r == 8
    assert load(TEXT + "lora: null\n", "lora.r=8").lora.r == 8
    assert load(TEXT, "data.eval.every=5").data.eval.every == 5


def test_an_override_may_have_an_equals_sign_or_nothing_as_its_value(load):
    assert load(TEXT, "data.newline=<a=b>").data.newline == "<a=b>"
    assert load(MIXED, "data.eval=").data.eval is None


def test_overrides_leave_the_file_as_it_was(load, tmp_path):
    load(MIXED, "lora.r=4", "data.where.lang=en")
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == MIXED
    assert load(MIXED).lora.r == 8
