"""The pages are true: commands can be typed, names exist, both languages say the same."""

import re
import shlex
from pathlib import Path

import pytest
from commands import ROOT
from page_commands import RECIPES, check_command, make_targets
from pages import (
    ENGLISH,
    JAPANESE,
    PAGES,
    block,
    code_in,
    commands,
    recipe_commands,
    recipe_header,
    sections,
    shell_lines,
    source,
    table,
    target_of,
)

from finetuning.recipe.recipe import Recipe, load_recipe

FOLDERS = "src|recipes|accelerate_configs|tests|benchmarks|slurm|docs|notebooks|examples"
TYPED = [(page, command) for page in PAGES for command in commands(page)]
TYPED += [(name, command) for name in RECIPES for command in recipe_commands(name)]


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_a_readme_is_at_most_8_kb(page):
    assert len(source(page).encode()) <= 8192


def test_the_readme_shows_the_recipe_as_it_is():
    recipe = (ROOT / "recipes" / "dolly_gpt2.yaml").read_text(encoding="utf-8")
    assert block("README.md", "A recipe", "yaml") == recipe


def test_the_readme_leads_to_every_page():
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", source("README.md"))}
    assert {page for page in ENGLISH if page != "README.md"} <= links


# Commands


@pytest.mark.parametrize(("page", "command"), TYPED, ids=[" ".join(case) for case in TYPED])
def test_a_command_can_be_typed(page, command):
    check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "make quickstrat",
        "accelerate launch --config_file=none.yaml src/sft.py recipes/quickstart.yaml",
        "accelerate launch src/sft.py recipes/dolly_gpt2.yaml training.max_step=10",
        "python src/look.py recipes/dolly_gpt2.yaml",
        "python src/preview.py recipes/dolly_gpt2.yaml --gpu t5",
        "python src/generate.py outputs/dolly_gpt3 Hello",
        "python src/publish.py outputs/dolly_gpt2 --try",
        "sbatch slurm/sft.sh --gres=gpu:1 accelerate_configs/ddp.yaml recipes/dolly_gpt2.yaml",
        "sbatch --wrap 'python src/look.py outputs/dolly_gpt2'",
        "pip install finetuning",
    ],
)
def test_a_command_that_cannot_be_typed_is_noticed(command):
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_command(command)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_its_schema_and_its_own_commands(name):
    first = recipe_header(name).splitlines()[0]
    assert first == "yaml-language-server: $schema=recipe.schema.json"
    recipe = load_recipe(ROOT / "recipes" / name)
    folder = recipe.training.output_dir
    typed = recipe_commands(name)
    assert any(f"{recipe.script} recipes/{name}" in command for command in typed)
    assert any(f"src/generate.py {folder}" in command for command in typed)
    assert all(f"recipes/{name}" in command or folder in command for command in typed)
    assert folder == f"outputs/{Path(name).stem}"


@pytest.mark.parametrize("name", RECIPES)
def test_sections_of_a_recipe_come_in_one_order(name):
    text = (ROOT / "recipes" / name).read_text(encoding="utf-8")
    found = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert found == [section for section in Recipe.model_fields if section in found]


# Names


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_of_a_page_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", source(page))
    assert [link for link in links if not target_of(page, link).exists()] == []
    paths = re.findall(rf"(?<![\w./~-])(?:{FOLDERS})/(?:[\w.*/-]*[\w*/])?", source(page))
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("name", RECIPES)
def test_paths_in_the_header_of_a_recipe_exist(name):
    paths = re.findall(rf"(?<![\w./])(?:{FOLDERS})/[\w./-]*\w", recipe_header(name))
    assert paths and all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_in_the_text_exist(page):
    assert set(re.findall(r"`make ([a-z-]+)", source(page))) <= make_targets()


def test_the_table_of_recipes_has_their_models_and_data():
    for link, model, data, _ in table("docs/recipe.md", "Recipes of this repository"):
        stem, file = re.fullmatch(r"\[(.+)\]\(\.\./recipes/(.+)\.yaml\)", link).groups()
        recipe = load_recipe(ROOT / "recipes" / f"{file}.yaml")
        assert stem == file
        assert model == (f"`{recipe.model.name}`" if recipe.model.name else "from scratch")
        assert data == f"`{recipe.data.path}`"


def test_the_table_of_sections_is_that_of_a_recipe():
    rows = table("docs/recipe.md", "Sections")
    assert [name for row in rows for name in code_in(row[0])] == list(Recipe.model_fields)


def test_the_settings_of_the_table_of_data_exist():
    rows = table("docs/data.md", "Which rows are trained")
    names = [name for row in rows for name in code_in(row[0])]
    fields = Recipe.model_fields["data"].annotation.model_fields
    assert names and {name.removeprefix("data.") for name in names} <= fields.keys()


# The two languages


@pytest.mark.parametrize(("page", "twin"), zip(ENGLISH, JAPANESE, strict=True))
def test_twins_have_the_same_headings_code_and_tables(page, twin):
    ours, theirs = sections(page), sections(twin)
    assert [one.level for one in ours] == [one.level for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert plain(one.blocks) == plain(other.blocks), one.title
        assert first_columns(one.tables) == first_columns(other.tables), one.title
        assert one.code == other.code, one.title
        assert numbers(one.text + one.cells) == numbers(other.text + other.cells), one.title


def plain(blocks: list[tuple[str, str]]) -> list[tuple[str, object]]:
    """Code blocks; of shell blocks only the commands, since comments are translated."""
    return [(name, shell_lines(text) if name == "sh" else text) for name, text in blocks]


def first_columns(tables: list[list[list[str]]]) -> list[list[list[str]]]:
    """What stands in backticks in the first column of every row."""
    return [[code_in(row[0]) for row in rows] for rows in tables]


def numbers(text: str) -> set[str]:
    """Numbers of two digits or more, as they are written."""
    return set(re.findall(r"\d[\d,.]*\d", text))


@pytest.mark.parametrize(("page", "twin"), zip(ENGLISH, JAPANESE, strict=True))
def test_twins_lead_to_each_other_in_the_same_place(page, twin):
    ours = source(page).split("\n\n").index(f"[日本語]({Path(twin).name})")
    theirs = source(twin).split("\n\n").index(f"[English]({Path(page).name})")
    assert ours == theirs


# Words and marks that docs/ does not use in Japanese, each with what is written instead.
NOT_USED = {
    "拒否": "エラーになります",
    "手元": "ローカルの",
    "黙って": "警告なしに",
    "割り込": "プリエンプト、中断",
    "デフォルト": "既定値",
    "トレーニング": "学習",
    "レスポンス": "応答",
    "ことができ": "できる",
    "こちら": "the noun itself",
    "尋ね": "問い合わせる",
    "壊れ": "破損した",
    "（": "(",
    "）": ")",
    "：": ":",
    "\u3000": "a half-width space",
}


@pytest.mark.parametrize("page", JAPANESE)
def test_japanese_pages_keep_to_the_words_and_marks_of_the_field(page):
    text = "\n".join(one.title + one.text + one.cells for one in sections(page))
    assert {word: better for word, better in NOT_USED.items() if word in text} == {}


@pytest.mark.parametrize("page", JAPANESE)
def test_japanese_pages_have_one_sentence_a_line(page):
    lines = [line for one in sections(page) for line in one.text.splitlines()]
    assert [line for line in lines if re.search(r"。[^)\s]", line)] == []


# What is shown


def test_a_command_that_is_shown_with_its_output_prints_that(run_script):
    shown = block("docs/recipe.md", "Sections", "text")
    ((command, output),) = re.findall(r"^\$ (.+)\n(.+)", shown, re.DOTALL)
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    answer = run_script(script.removeprefix("src/"), *arguments)
    assert (answer.stdout + answer.stderr, answer.returncode) == (output, 2)
