"""The notebook says nothing that the recipes, the scripts and the README do not."""

import ast
import json
import re
import shlex
from types import SimpleNamespace

import pytest
from conftest import ROOT
from page_commands import check_command

from finetuning.recipe.recipe import load_recipe

NOTEBOOK = json.loads((ROOT / "notebooks" / "t4.ipynb").read_text(encoding="utf-8"))
RECIPE = "recipes/harry_potter_bloomz_1b1_lora8bit.yaml"
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SHELL = [line[1:] for cell in CODE for line in cell.splitlines() if line.startswith("!")]
OURS = [line for line in SHELL if re.match("python|accelerate", line)]


def test_it_is_a_notebook_for_a_gpu_and_was_saved_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["metadata"]["accelerator"]) == (4, "GPU")
    for cell in NOTEBOOK["cells"]:
        assert cell["source"] and cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("command", OURS)
def test_a_command_can_be_typed(command):
    check_command(command)
    assert RECIPE in command or load_recipe(ROOT / RECIPE).training.output_dir in command


def test_it_goes_the_whole_way_in_order():
    steps = [
        "git clone",
        "pip install",
        "torch.cuda.init",
        "src/preview.py",
        "src/sft.py",
        "samples.md",
        "src/generate.py",
        "rsync",
    ]
    text = "\n".join(CODE)
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    assert len(OURS) == 3


def test_every_version_that_is_installed_is_a_tested_one():
    (install,) = [shlex.split(line) for line in SHELL if line.startswith("pip install")]
    assert (
        install[install.index("--constraint") + 1] == "constraints.txt"
        and (ROOT / "constraints.txt").exists()
    )


def test_the_folder_it_shows_and_saves_is_the_recipes():
    recipe = load_recipe(ROOT / RECIPE)
    folder, text = recipe.training.output_dir, "\n".join(CODE)
    assert set(re.findall(r"outputs/\w+", text)) == {folder}
    data, _, file = recipe.data.path.rpartition("/")
    assert f"mkdir -p {data}" in text and f"{file} {data}/" in text


def test_the_rest_is_python():
    for cell in CODE:
        ast.parse(
            "\n".join("pass" if line[:1] in ("!", "%") else line for line in cell.splitlines())
        )


def test_it_stops_where_no_repository_is_filled_in():
    (cell,) = [code for code in CODE if "git clone" in code]
    first = "\n".join(cell.splitlines()[:2])
    with pytest.raises(AssertionError, match="REPOSITORY is empty"):
        exec(first, {})
    exec(first.replace('""', '"https://example.com/a"', 1), {})


def test_it_stops_where_torch_has_no_gpu_and_says_what_to_do(monkeypatch):
    (cell,) = [code for code in CODE if "torch.cuda.init" in code]
    error = (
        "Traceback (most recent call last):\nRuntimeError: Found no NVIDIA driver on your system"
    )
    done = SimpleNamespace(returncode=1, stdout="", stderr=error)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    with pytest.raises(AssertionError, match=r"Found no NVIDIA driver.*\n.*T4 GPU") as stopped:
        exec(cell, {})
    (version,) = re.findall(r"torch==([\d.]+)\+cu126", str(stopped.value))
    assert f"torch=={version}\n" in (ROOT / "constraints.txt").read_text("utf-8")
    done.returncode = 0
    exec(cell, {})
