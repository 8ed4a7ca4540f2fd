"""A run folder belongs to one run and is written by one process."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import RECIPE, ROWS, assert_one_line, write_files
from conftest import ROOT

from finetuning.errors import UserError
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.environment import write_start
from finetuning.runs.output_folder import lock, make_folder, require_free_or_ours

# Holds the lock of a folder until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, "src")
from finetuning.runs.output_folder import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """Its run folder is tmp_path/run."""
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    (tmp_path / "run").mkdir()
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture
def held_elsewhere(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    (tmp_path / "run").mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_in_one_line_before_torch_is_imported(
    recipe, held_elsewhere, run_fork, tmp_path
):
    refused = run_fork("sft.py", str(tmp_path / "recipe.yaml"))
    assert_one_line(
        refused,
        [f"{tmp_path / 'run'} is in use: another run writes to it; wait for its end, or choose"],
    )


def test_the_process_that_holds_the_folder_is_named(recipe, held_elsewhere):
    folder = Path(recipe.training.output_dir)
    write_start(folder, recipe, "rows", {"host": "node7", "process": 4321})
    with pytest.raises(
        UserError, match=r"is in use: another run writes to it \(process 4321 on node7\); "
    ) as refused:
        lock(folder)
    assert "\n" not in str(refused.value)


def test_a_run_that_was_killed_leaves_its_folder_free(held_elsewhere, tmp_path):
    with pytest.raises(UserError, match="is in use"):
        lock(tmp_path / "run")
    held_elsewhere.kill()
    held_elsewhere.wait()
    assert (tmp_path / "run" / ".lock").exists()
    held = lock(tmp_path / "run")
    with pytest.raises(UserError, match="is in use"):
        lock(tmp_path / "run")
    del held
    lock(tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "checkpoint-3"])
def test_a_folder_with_weights_of_somebody_else_is_not_trained_into(tmp_path, name):
    """A base model's, say."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="which could be overwritten; choose"):
        require_free_or_ours(tmp_path)


def test_two_at_once_find_that_a_folder_can_be_written(tmp_path):
    """Nodes, say, whose processes have the same number."""
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(make_folder, [tmp_path] * 2000)) == {tmp_path}
