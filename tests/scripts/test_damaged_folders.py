"""Any file of a run folder in any state: no traceback, nothing damaged is finished or published."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT
from matplotlib.figure import Figure
from run_folders import run_folder

import compare
import generate
import sft
from finetuning.errors import UserError
from finetuning.publishing.publishable import require_publishable
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.checkpoints import content_damage
from finetuning.runs.folder import RunFolder

STEPS = 2


def halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "halved": halve,
    "flipped": flip,
    "null": lambda file: file.write_text("null"),
    "empty": lambda file: file.write_bytes(b""),
    "folder": replace_by_folder,
    "unreadable": lambda file: file.chmod(0),
}
FILES = [
    *("model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "sealed.json"),
    *("recipe.yaml", "environment.json", "metrics.jsonl", "samples.json", "samples.md", ".lock"),
    *("answers.jsonl", "evaluation.json"),
]
OF_CHECKPOINT = ["trainer_state.json", "optimizer.pt", "model.safetensors", "sealed.json"]
SEALED = FILES[:5]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with a checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        saves = ["training.save_strategy=steps", f"training.save_steps={STEPS}"]
        steps = [f"training.max_steps={STEPS}", *saves]
        return run_folder(folder, *steps, "generation.prompts=[Hi]", "training.eval_strategy=no")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def damage(run: Path, name: str, how: str) -> None:
    file = run / name
    if not (file.exists() and file.stat().st_size):
        file.write_text("x")  # .lock, which is empty
    if how == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads every file")
    DAMAGES[how](file)


def assert_no_traceback(ended) -> None:
    said = ended.out + ended.err
    assert "Traceback" not in said, said
    assert ended.code in (0, 1, 2), said
    if ended.code:
        assert ended.err.splitlines()[-1].startswith("error: "), said


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("script", [generate, compare], ids=lambda script: script.__name__)
def test_what_reads_a_run_folder_has_no_traceback(run, call, monkeypatch, script, name, how):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # half of the test's time
    damage(run, name, how)
    arguments = ["Hi", "generation.max_new_tokens=2"] if script is generate else []
    ended = call(script, run, *arguments)
    assert_no_traceback(ended)
    if script is generate and name in SEALED and how not in ("flipped", "unreadable"):
        assert ended.code == 2 and name in ended.err


def own_recipe(run: Path, tmp_path: Path) -> Path:
    """A copy beside the run folder, as it was before the damage."""
    file = tmp_path / "own.yaml"
    file.write_text(load_recipe(run / "recipe.yaml").as_yaml(), encoding="utf-8")
    return file


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, *(f"checkpoint-{STEPS}/{n}" for n in OF_CHECKPOINT)])
def test_the_same_command_ends_with_a_whole_finished_run_or_one_line(
    run, call, tmp_path, name, how
):
    recipe = own_recipe(run, tmp_path)
    damage(run, name, how)
    ended = call(sft, recipe, f"training.output_dir={run}")
    assert_no_traceback(ended)
    if ended.code == 0 and how != "flipped":
        assert json.loads((run / "environment.json").read_text())["finished"]
        assert content_damage(run) is None and (run / "model.safetensors").is_file()


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", SEALED)
def test_nothing_damaged_is_published(run, name, how):
    recipe = load_recipe(run / "recipe.yaml", ["publish={repo: you/models, subfolder: one}"])
    require_publishable(RunFolder(run), recipe, unfinished=False)
    damage(run, name, how)
    if how == "unreadable":
        return
    with pytest.raises(UserError, match=f"{name} .*; the command that trained it writes"):
        require_publishable(RunFolder(run), recipe, unfinished=False)
