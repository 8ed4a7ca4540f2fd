"""A small recipe that stands for a large one ends in one line, at once."""

import time

import pytest
from commands import RECIPE, write_files

from finetuning.errors import UserError
from finetuning.recipe.recipe import load_recipe

LEVELS = "\n".join(
    f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10 if n else ['x'])}]" for n in range(9)
)
BOMBS = {
    "aliases of aliases": (f"data:\n{LEVELS}\n", "is an alias; write out"),
    "an alias": ("model: &a {name: x}\ndata: *a\n", "recipe.yaml:2: *a is an alias"),
    "merged": ("model: &a {name: x}\ndata:\n  <<: *a\n", "is an alias"),
    "large": ("data: " + "x" * 300_000, "at most 200,000"),
    "deep": ("data: " + "[" * 100_000, "is n"),
    "digits": ("training:\n  max_steps: " + "9" * 5000, "recipe"),
    "date": ("training:\n  max_steps: 2020-99-99", "recipe"),
    "object": ("data: !!python/object/apply:os.system [echo]", "recipe"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_one_line_at_once(kind, tmp_path):
    text, expected = BOMBS[kind]
    (tmp_path / "recipe.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert expected in str(error.value) and time.monotonic() - began < 20


def test_an_override_is_no_bomb_either(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name: x}\n")
    with pytest.raises(UserError, match="is an alias"):
        load_recipe(tmp_path / "recipe.yaml", ["data.where={a: &a [x], b: *a}"])


@pytest.mark.parametrize("field", ["target_modules=(a+)+$", "rank_pattern={'(.*a)*b': 4}"])
def test_an_expression_that_could_take_for_ever_is_refused(field, tmp_path):
    write_files(tmp_path, {"recipe.yaml": RECIPE})
    with pytest.raises(UserError, match=r"lora.* which could take for ever to match"):
        load_recipe(tmp_path / "recipe.yaml", [f"lora.{field}"])
    load_recipe(tmp_path / "recipe.yaml", [r"lora.target_modules=.*\.(?:q|v)_proj"])
