"""src/sweep.py: every line of a file is trained, and the same command resumes."""

import json
import shutil

import pytest
from commands import RECIPE, ROOT, ROWS, write_files

pytestmark = pytest.mark.usefixtures("warm_python")


def test_a_sweep_trains_every_line_and_leaves_what_is_finished(run_script, tmp_path):
    recipe = RECIPE.replace("  output_dir: FOLDER/run\n", "").replace(
        "max_steps: 2", "max_steps: 2\n  learning_rate: 1e-2\n  lr_scheduler_type: constant"
    )
    recipe = recipe.replace("training:", "training:\n  output_dir: unused")
    write_files(tmp_path, {"recipe.yaml": recipe, "rows.jsonl": ROWS, "seeds.txt": ""})
    name = f"sweep_{tmp_path.name}"
    file = tmp_path / f"{name}.txt"
    folder = ROOT / "outputs" / name
    file.write_text("training.seed=1\ntraining.sed=2\n")
    command = ["accelerate_configs/cpu.yaml", tmp_path / "recipe.yaml", file]
    try:
        failed = run_script("sweep.py", *command, timeout=300)
        assert failed.returncode == 2, failed.stderr
        assert "not finished: line 2" in failed.stderr.splitlines()[-1]
        file.write_text("training.seed=1\ntraining.seed=2\n")
        done = run_script("sweep.py", *command, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "1 is finished" in done.stdout
        launches = [
            json.loads((folder / line / "environment.json").read_text())["launches"]
            for line in "12"
        ]
        assert [len(launch) for launch in launches] == [1, 1]  # line 1 was not trained again
        assert (folder / "comparison.csv").exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_check_of_a_sweep_reads_every_line_and_names_the_wrong_one(run_script, tmp_path):
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    (tmp_path / "rates.txt").write_text("training.learning_rate=1e-4\ntraining.learning_rat=1e-3\n")
    done = run_script(
        "sweep.py",
        "--check",
        "accelerate_configs/cpu.yaml",
        tmp_path / "recipe.yaml",
        tmp_path / "rates.txt",
    )
    assert done.returncode == 2
    assert "are right; nothing was trained" in done.stdout  # the first line
    assert "line 2 of " in done.stderr.splitlines()[-1]
    assert "override 'training.learning_rat=1e-3'" in done.stderr.splitlines()[-1]
