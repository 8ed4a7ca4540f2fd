"""The READMEs, CONTRIBUTING.md, docs/ and the headers of recipes say nothing that is not so."""

import ast
import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import RECIPES, check_command, folders_made, make_targets

from finetuning.data import readers, templates
from finetuning.recipe.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "README.ja.md"]
MANUALS = ["docs/slurm.md", "docs/slurm.ja.md"]
PAGES = [*READMES, "CONTRIBUTING.md", *MANUALS]
FOLDERS = "src|recipes|accelerate_configs|tests|benchmarks|slurm|docs|notebooks"


# Reading the pages


def text_of(name: str) -> str:
    """A page; of a recipe the comment it begins with."""
    if name in PAGES:
        return (ROOT / name).read_text(encoding="utf-8")
    lines = (ROOT / "recipes" / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))])


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[str]:
    """The shell lines of a page, or those indented in a recipe's header; comments taken off."""
    if name in PAGES:
        lines = [
            line for block in blocks(name, "sh") for line in block.replace("\\\n", " ").splitlines()
        ]
    else:
        lines = [
            line.removeprefix("#   ")
            for line in text_of(name).splitlines()
            if line.startswith("#   ")
        ]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def tables(page: str) -> list[list[list[str]]]:
    """Every table's rows of cells, without its head."""
    found = re.findall(r"^\|[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", text_of(page), re.MULTILINE)
    return [[row.strip("|").split(" | ") for row in table.splitlines()] for table in found]


def table_of(page: str, name: str) -> list[list[str]]:
    """The table that has the name in its first column."""
    return next(table for table in tables(page) if any(name in row[0] for row in table))


def file_map(page: str) -> list[str]:
    """Paths in the tree of files; folders end in a slash."""
    tree = next(
        block for block in blocks(page, "text") if re.search(r"^src/$", block, re.MULTILINE)
    )
    paths, above = [], [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth + 1 :] = [above[depth] + line.split()[0]]
        paths.append(above[-1])
    return paths


# Commands


EVERY_COMMAND = [(name, command) for name in [*PAGES, *RECIPES] for command in commands(name)]


@pytest.mark.parametrize(
    ("name", "command"), EVERY_COMMAND, ids=[" ".join(case) for case in EVERY_COMMAND]
)
def test_a_command_can_be_typed(name, command):
    check_command(command, folders_made())


@pytest.mark.parametrize(
    "command",
    [
        "make quickstrat",
        "accelerate launch --config_file accelerate_configs/zero9.yaml src/sft.py recipes/dolly_gpt2.yaml",
        "accelerate launch src/sft.py recipes/dolly_gpt3.yaml",
        "accelerate launch src/sft.py recipes/dolly_gpt2.yaml training.max_step=10",
        "accelerate launch src/preview.py recipes/dolly_gpt2.yaml",
        "python src/look.py recipes/dolly_gpt2.yaml",
        "python src/preview.py recipes/dolly_gpt2.yaml --gpu t5",
        "python src/preview.py recipes/dolly_gpt2.yaml --grafics t4",
        "python src/generate.py outputs/dolly_gpt3 Hello",
        "python src/generate.py outputs/dolly_gpt2 generation.max_tokens=1",
        "python src/publish.py outputs/dolly_gpt3",
        "python src/publish.py outputs/dolly_gpt2 --try",
        "python src/publish.py outputs/dolly_gpt2 publish.folder=x",
        "python src/pull.py elith/llm-book-models ../x",
        "pip install finetuning",
        "sbatch slurm/sft.sh accelerate_configs/zero9.yaml recipes/dolly_gpt2.yaml",
        "sbatch slurm/sft.sh --gres=gpu:1 -- accelerate_configs/ddp.yaml recipes/dolly_gpt2.yaml",
        "sbatch slurm/train.sh accelerate_configs/ddp.yaml recipes/dolly_gpt2.yaml",
        "slurm/array.sh --gres=gpu:1 -- accelerate_configs/ddp.yaml recipes/dolly_gpt2.yaml slurm/none.txt",
        "slurm/sft.sh --check accelerate_configs/ddp.yaml recipes/dolly_gpt2.yaml training.max_step=1",
        "sbatch --wrap 'python src/look.py outputs/dolly_gpt2'",
    ],
)
def test_a_command_that_cannot_be_typed_is_noticed(command):
    with pytest.raises((AssertionError, ValueError)):
        check_command(command, folders_made())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_its_schema_and_its_own_commands(name):
    first = (ROOT / "recipes" / name).read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    folder = load_recipe(ROOT / "recipes" / name).training.output_dir
    typed = commands(name)
    assert any(f"src/sft.py recipes/{name}" in command for command in typed)
    assert any(f"src/generate.py {folder}" in command for command in typed)
    assert all(f"recipes/{name}" in command or folder in command for command in typed)
    assert folder == f"outputs/{Path(name).stem}"


@pytest.mark.parametrize("name", RECIPES)
def test_sections_come_in_one_order(name):
    sections = re.findall(
        r"^(\w+):", (ROOT / "recipes" / name).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sections == [section for section in Recipe.model_fields if section in sections]


# Names


@pytest.mark.parametrize("name", [*PAGES, *RECIPES])
def test_paths_exist(name):
    text = text_of(name)
    found = re.findall(rf"(?<![\w./~-])(?:{FOLDERS})/(?:[\w.*/-]*[\w*/])?", text)
    found += re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    found += re.findall(r"`([\w.-]+\.(?:toml|txt))`", text)
    here = (ROOT / name).parent if name in PAGES else ROOT
    missing = sorted(
        {
            p
            for p in found
            if not list(ROOT.glob(p.rstrip("/"))) and not list(here.glob(p.rstrip("/")))
        }
    )
    assert found and not missing


@pytest.mark.parametrize("page", [*READMES, "CONTRIBUTING.md"])
def test_make_targets_in_the_text_exist(page):
    found = set(re.findall(r"`make ([a-z-]+)", text_of(page)))
    assert found and found <= make_targets()


@pytest.mark.parametrize("page", READMES)
def test_the_file_map_has_every_file_of_src_and_every_folder(page):
    paths = file_map(page)
    assert [
        path
        for path in paths
        if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()
    ] == []
    source = list((ROOT / "src").glob("*.py"))
    source += [path.parent for path in (ROOT / "src" / "finetuning").glob("*/__init__.py")]
    assert {path.rstrip("/") for path in paths if path.startswith("src/")} - {
        "src",
        "src/finetuning",
    } == {path.relative_to(ROOT).as_posix() for path in source}
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    folders = {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir()
        and any(path.iterdir())
        and not any(fnmatch.fnmatch(path.name, name) for name in [".*", *ignored])
    }
    assert {path for path in paths if path.count("/") == 1 and path.endswith("/")} == folders


@pytest.mark.parametrize("page", READMES)
def test_the_table_of_recipes_lists_them_all_with_their_models_and_data(page):
    listed = {}
    for link, model, data, _ in table_of(page, "[quickstart]"):
        stem, file = re.fullmatch(r" ?\[(.+)\]\(recipes/(.+)\.yaml\)", link).groups()
        assert stem == file
        listed[f"{file}.yaml"] = (model, data)
    expected = {}
    for name in RECIPES:
        recipe = load_recipe(ROOT / "recipes" / name)
        model = f"`{recipe.model.name}`" if recipe.model.name else "from scratch"
        expected[name] = (model, f"`{recipe.data.path}`")
    assert listed == expected


@pytest.mark.parametrize("page", READMES)
def test_the_table_of_sections_is_that_of_a_recipe(page):
    assert [row[0].strip(" `") for row in table_of(page, "`model`")] == list(Recipe.model_fields)


# The two languages


def test_both_readmes_have_the_same_commands_and_snippets():
    english, japanese = READMES
    assert commands(english) == commands(japanese)
    for language in ("python", "yaml"):
        assert blocks(english, language) == blocks(japanese, language)
    assert file_map(english) == file_map(japanese)
    trees = [next(block for block in blocks(page, "text") if "src/\n" in block) for page in READMES]
    texts = [[block for block in blocks(page, "text") if block not in trees] for page in READMES]
    assert texts[0] == texts[1] and len(texts[0]) >= 3


@pytest.mark.parametrize("pages", [READMES, MANUALS], ids=["readme", "slurm"])
def test_both_languages_have_the_same_headings(pages):
    levels = [
        [len(marks) for marks in re.findall(r"^(#+) ", text_of(page), re.MULTILINE)]
        for page in pages
    ]
    assert levels[0] == levels[1]


def test_both_readmes_have_the_same_tables():
    names = [
        [[re.findall("`[^`]+`", row[0]) for row in table] for table in tables(page)]
        for page in READMES
    ]
    assert names[0] == names[1]


def test_both_manuals_have_the_same_commands():
    assert commands(MANUALS[0]) == commands(MANUALS[1]) and len(commands(MANUALS[0])) >= 10


# What is shown


def shown_runs() -> list[tuple[str, str]]:
    """(command, what it prints) of blocks that show a command behind a dollar sign."""
    return [
        match
        for block in blocks("README.md", "text")
        for match in re.findall(r"^\$ (.+)\n((?:[^$].*\n)+)", block)
    ]


@pytest.mark.parametrize(("command", "output"), shown_runs())
def test_a_command_prints_what_is_shown(command, output, run_script):
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    answer = run_script(script.removeprefix("src/"), *arguments)
    assert answer.stdout + answer.stderr == output
    assert answer.returncode == 2


def test_the_worked_example_is_what_reader_and_template_make():
    block = next(block for block in blocks("README.md", "text") if block.startswith("row "))
    steps = {
        line.split()[0]: ast.literal_eval(line.split(maxsplit=1)[1]) for line in block.splitlines()
    }
    messages = readers.READERS["dolly"](steps["row"])
    assert messages == steps["messages"]
    template = templates.MarkerTemplate(templates.TEMPLATES["question_answer"], eos="<|endoftext|>")
    segments = template.render(messages)
    assert (
        "".join(segment.text for segment in segments if not segment.is_response) == steps["prompt"]
    )
    assert "".join(segment.text for segment in segments if segment.is_response) == steps["response"]
    assert (
        steps["labels"] == [-100] * 14 + steps["input_ids"][14:] and len(steps["input_ids"]) == 16
    )


def test_the_least_recipe_loads(tmp_path):
    (block,) = blocks("README.md", "yaml")
    (tmp_path / "faq.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "faq.yaml")
    assert recipe.data.path == "faq.jsonl" and recipe.training.learning_rate == 2e-5


def snippets() -> tuple[str, str, str]:
    """The reader, its line in READERS, the entry of TEMPLATES."""
    _, function, line, entry = blocks("README.md", "python")
    return function, line, entry


def test_the_reader_shown_reads_and_refuses():
    namespace = dict(vars(readers))
    function, line, _ = snippets()
    exec(function, namespace)
    (read,) = eval(f"{{{line}}}", namespace).values()
    assert read({"title": "How?", "body": "So."}) == [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So."},
    ]
    with pytest.raises(readers.BadRow, match="column body"):
        read({"title": "How?"})


def test_the_template_shown_renders():
    (markers,) = eval(f"{{{snippets()[2]}}}", dict(vars(templates))).values()
    segments = templates.MarkerTemplate(markers, eos="</s>").render(
        [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    )
    assert [segment.text for segment in segments] == ["Q: How?\n", "A:", " So.", "</s>"]
    assert [segment.is_response for segment in segments] == [False, False, True, True]


def insert(file: Path, before: str, text: str) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count(before) == 1
    file.write_text(source.replace(before, text + before), encoding="utf-8")


def test_reader_and_template_work_when_put_where_the_readme_says(tmp_path):
    function, line, entry = snippets()
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "src" / "finetuning"
    insert(package / "data" / "readers.py", "\nREADERS: dict", f"\n{function}\n")
    insert(package / "data" / "readers.py", '    "dolly": read_dolly,\n', f"    {line}")
    insert(package / "data" / "templates.py", '    "chat": None', f"    {entry}")
    rows = [{"title": f"How {n}?", "body": "So."} for n in range(9)]
    (tmp_path / "faq.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = ROOT / "recipes" / "quickstart.yaml"
    changes = [
        "data.path=faq.jsonl",
        "data.reader=faq",
        "data.template=short",
        f"training.output_dir={tmp_path}/run",
    ]
    command = [sys.executable, "src/preview.py", str(recipe), *changes]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "Q: How 0?\nA: So.<|endoftext|>" in answer.stdout


def test_a_run_leaves_what_the_readme_lists_and_prints_what_it_shows(tmp_path, run_script):
    folder = tmp_path / "run"
    changes = [f"training.output_dir={folder}", "training.max_steps=2", "training.eval_strategy=no"]
    looked = run_script("preview.py", "recipes/quickstart.yaml", *changes)
    trained = run_script("sft.py", "recipes/quickstart.yaml", *changes, timeout=300)
    assert (looked.returncode, trained.returncode) == (0, 0), looked.stderr + trained.stderr

    listed = [re.findall(r"`([^`]+)`", row[0]) for row in table_of("README.md", "`recipe.yaml`")]
    patterns = [pattern for names in listed for pattern in names]
    left = [path.name for path in folder.iterdir()]
    assert [
        name for name in left if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ] == []
    assert [pattern for pattern in patterns if not fnmatch.filter(left, pattern)] == []
    preview = next(
        row[1] for row in table_of("README.md", "`recipe.yaml`") if "`preview`" in row[0]
    )
    files = set(re.findall(r"`([^`]+)`", preview)) - {"src/preview.py"}
    assert files == {path.name for path in (folder / "preview").iterdir()}

    sample = next(
        block for block in blocks("README.md", "text") if block.startswith("rows ")
    ).splitlines()
    assert [line for line in sample[:3] if line not in trained.stdout.splitlines()] == []
    assert "run folder: " in sample[-2] and f"run folder: {folder}" in trained.stdout
