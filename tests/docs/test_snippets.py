"""Snippets of the pages run, and a run prints and leaves what the pages say."""

import ast
import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from pages import block, code_in, table

from finetuning.data import readers, templates
from finetuning.recipe.recipe import load_recipe


def test_the_worked_example_is_what_reader_and_template_make():
    lines = block("docs/data.md", "From a row to the loss", "text").splitlines()
    steps = {line.split()[0]: ast.literal_eval(line.split(maxsplit=1)[1]) for line in lines}
    messages = readers.READERS["dolly"](steps["row"])
    assert messages == steps["messages"]
    template = templates.MarkerTemplate(templates.TEMPLATES["question_answer"], eos="<|endoftext|>")
    segments = template.render(messages)
    for name, is_response in (("prompt", False), ("response", True)):
        assert "".join(s.text for s in segments if s.is_response == is_response) == steps[name]
    assert len(steps["input_ids"]) == 16
    assert steps["labels"] == [-100] * 14 + steps["input_ids"][14:]


def test_the_least_recipe_loads(tmp_path):
    (tmp_path / "faq.yaml").write_text(block("docs/recipe.md", "Write a recipe", "yaml"))
    recipe = load_recipe(tmp_path / "faq.yaml")
    assert recipe.data.path == "faq.jsonl" and recipe.training.learning_rate == 2e-5


def test_the_mixture_of_sources_loads(tmp_path):
    least = block("docs/recipe.md", "Write a recipe", "yaml").splitlines()
    mixture = block("docs/data.md", "Where rows come from", "yaml")
    others = "\n".join(line for line in least if not line.startswith("data"))
    (tmp_path / "mix.yaml").write_text(f"{others}\n{mixture}")
    sources = load_recipe(tmp_path / "mix.yaml").data.sources
    assert [(one.reader, one.weight) for one in sources] == [("prompt_response", 2), ("dolly", 1)]


READER = block("docs/data.md", "Add a reader", "python")
READER_LINE = block("docs/data.md", "Name the reader", "python")
TEMPLATE_LINE = block("docs/data.md", "Add a template", "python")


def test_the_reader_shown_reads_and_refuses():
    namespace = dict(vars(readers))
    exec(READER, namespace)
    (read,) = eval(f"{{{READER_LINE}}}", namespace).values()
    assert read({"title": "How?", "body": "So."}) == [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So."},
    ]
    with pytest.raises(readers.BadRow, match="column body"):
        read({"title": "How?"})


def test_the_template_shown_renders():
    (markers,) = eval(f"{{{TEMPLATE_LINE}}}", dict(vars(templates))).values()
    segments = templates.MarkerTemplate(markers, eos="</s>").render(
        [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    )
    assert [segment.text for segment in segments] == ["Q: How?\n", "A:", " So.", "</s>"]
    assert [segment.is_response for segment in segments] == [False, False, True, True]


def insert(file: Path, before: str, text: str) -> None:
    code = file.read_text(encoding="utf-8")
    assert code.count(before) == 1
    file.write_text(code.replace(before, text + before), encoding="utf-8")


@pytest.fixture
def extended(tmp_path):
    """A copy of src/ with the reader and the template that the page shows."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("src", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    data = tmp_path / "src" / "finetuning" / "data"
    insert(data / "readers.py", "\nREADERS: dict", f"\n{READER}\n")
    insert(data / "readers.py", '    "dolly": read_dolly,\n', f"    {READER_LINE}")
    insert(data / "templates.py", '    "question_answer": Markers(', f"    {TEMPLATE_LINE}")
    rows = [{"title": f"How {n}?", "body": "So."} for n in range(9)]
    (tmp_path / "faq.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_reader_and_template_work_when_put_where_the_page_says(extended):
    changes = ["data.path=faq.jsonl", "data.reader=faq", "data.template=short"]
    changes += [f"training.output_dir={extended}/run"]
    command = [sys.executable, "src/preview.py", "recipes/quickstart.yaml", *changes]
    answer = subprocess.run(command, cwd=extended, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "Q: How 0?\nA: So.<|endoftext|>" in answer.stdout


@pytest.mark.usefixtures("warm_python")
def test_a_run_leaves_what_the_page_lists_and_prints_what_the_readme_shows(tmp_path, run_script):
    folder = tmp_path / "run"
    changes = [f"training.output_dir={folder}", "training.max_steps=2", "training.logging_steps=1"]
    changes += ["training.use_cpu=true"]
    looked = run_script("preview.py", "recipes/quickstart.yaml", *changes)
    trained = run_script("sft.py", "recipes/quickstart.yaml", *changes, timeout=300)
    assert (looked.returncode, trained.returncode) == (0, 0), looked.stderr + trained.stderr

    rows = table("docs/recipe.md", "The run folder")
    patterns = [name for row in rows for name in code_in(row[0])]
    left = [path.name for path in folder.iterdir()]
    matched = {pattern: fnmatch.filter(left, pattern) for pattern in patterns}
    assert [pattern for pattern, names in matched.items() if not names] == []
    assert set(left) == {name for names in matched.values() for name in names}

    (preview,) = [row[1] for row in rows if "`preview`" in row[0]]
    files = set(code_in(preview)) - {"src/preview.py"}
    assert files == {path.name for path in (folder / "preview").iterdir()}

    printed = trained.stdout.replace(str(folder), "outputs/quickstart").splitlines()
    shown = block("README.md", "Quickstart", "text").splitlines()
    assert [line for line in shown[:5] if line not in printed] == []
    rest = [
        line for line in shown[5:-1] if line[0] not in ".┏┡┃│"
    ]  # a table is as wide as its answers
    assert len(rest) >= 8
    assert {shape(line) for line in rest} <= {shape(line) for line in printed}


def shape(line: str) -> str:
    """A line of a run without its numbers and the spaces between."""
    return re.sub(r"\d[\d.,:e+-]*", "0", " ".join(line.split()))
