"""Early stopping ends at the step that a plain loop over the evaluation losses gives."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import QUICKSTART, error_of, interrupted

import sft
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.folder import RunFolder
from finetuning.training.sft_config import make_arguments

EVERY, STEPS, PATIENCE = 2, 30, 2
STOPS = (f"training.early_stopping_patience={PATIENCE}", "training.load_best_model_at_end=true")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A run that soon knows its few rows by heart, and answers others worse and worse."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"{n} + 1?", "response": str(n * 7919 % 97)} for n in range(40)]
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return [
        f"data.path={rows}",
        "data.eval={every: 2}",
        f"training.max_steps={STEPS}",
        "training.learning_rate=3e-3",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        f"training.eval_steps={EVERY}",
        f"training.save_steps={EVERY}",
        "training.save_total_limit=100",
        "training.logging_steps=1",
        "training.report_to=none",
        "training.use_cpu=true",
        "generation.prompts=[]",
        "evaluation.questions=0",
    ]


def train(folder: Path, settings: list[str], *more: str) -> Path:
    sft.main([str(QUICKSTART), f"training.output_dir={folder}", *settings, *more])
    return folder


def plain_loop(steps: list[int], losses: list[float], threshold: float = 0.0) -> tuple[int, int]:
    """(step at which it ends, best step)."""
    best, best_step, without_gain = float("inf"), 0, 0
    for step, loss in zip(steps, losses, strict=True):
        if step == 0:
            continue  # the base model
        without_gain = 0 if best - loss > threshold else without_gain + 1
        if loss < best:
            best, best_step = loss, step
        if without_gain == PATIENCE:
            return step, best_step
    raise AssertionError("it never ends")


def ends_at(folder: Path) -> int:
    return RunFolder(folder).metrics[-1]["step"]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The run that nothing stops."""
    return train(tmp_path_factory.mktemp("whole") / "run", settings)


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory) -> Path:
    """The run that early stopping ends."""
    return train(tmp_path_factory.mktemp("stopped") / "run", settings, *STOPS)


def test_it_stops_where_a_plain_loop_does_and_keeps_the_best(whole, stopped, settings):
    step, best = plain_loop(*RunFolder(whole).curve("eval_loss"))
    assert best < step < STEPS
    assert ends_at(stopped) == step
    assert RunFolder(stopped).environment["kept_step"] == best
    assert RunFolder(whole).environment["kept_step"] == STEPS
    best_weights = (stopped / f"checkpoint-{best}" / "model.safetensors").read_bytes()
    assert (stopped / "model.safetensors").read_bytes() == best_weights


def test_the_threshold_counts(whole, settings, tmp_path):
    threshold = 0.3
    more = (STOPS[0], f"training.early_stopping_threshold={threshold}")
    run = train(tmp_path / "run", settings, *more)
    step, _ = plain_loop(*RunFolder(whole).curve("eval_loss"), threshold)
    assert ends_at(run) == step < ends_at(train(tmp_path / "other", settings, STOPS[0]))


@pytest.mark.parametrize("back", [0, 2])
def test_a_run_that_was_killed_stops_at_the_same_step(stopped, settings, tmp_path, back, capsys):
    """From its last checkpoint, written when it had stopped, and from those before."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    step = ends_at(stopped)
    gone = [f"checkpoint-{step - EVERY * number}" for number in range(back)]
    interrupted(run, *gone, "model.safetensors", "sealed.json")
    train(run, settings, *STOPS)
    assert ends_at(run) == step
    assert RunFolder(run).curve("loss") == RunFolder(stopped).curve("loss")
    same = [(folder / "model.safetensors").read_bytes() for folder in (run, stopped)]
    assert same[0] == same[1]
    assert f"stopped early at step {step}" in capsys.readouterr().out


def test_it_needs_evaluations(call, settings, tmp_path):
    more = (*settings, STOPS[0], "training.eval_strategy=no")
    done = call(sft, "--check", QUICKSTART, f"training.output_dir={tmp_path / 'run'}", *more)
    assert "early_stopping_patience counts evaluations, but there are none" in error_of(done)


def test_of_perplexities_the_lowest_is_the_best(settings):
    def arguments(*more: str):
        return make_arguments(load_recipe(QUICKSTART, [*settings, *STOPS, *more]), has_eval=True)

    assert arguments().metric_for_best_model == "loss"
    assert arguments().greater_is_better is False
    assert arguments("training.metric_for_best_model=perplexity").greater_is_better is False
    assert arguments("training.metric_for_best_model=mean_token_accuracy").greater_is_better is True


@pytest.mark.cluster
@pytest.mark.usefixtures("warm_python")
def test_two_processes_stop_together_where_their_losses_say(settings, tmp_path):
    def launch(name: str, *more: str) -> Path:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", "accelerate_configs/cpu_ddp.yaml", "src/sft.py"]
        command += [str(QUICKSTART), f"training.output_dir={tmp_path / name}", *settings, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    step, _ = plain_loop(*RunFolder(launch("whole")).curve("eval_loss"))
    stopped = launch("stopped", *STOPS)
    assert ends_at(stopped) == step < STEPS
    weights = (stopped / "model.safetensors").read_bytes()
    gone = (f"checkpoint-{step}", "model.safetensors", "sealed.json")
    interrupted(stopped, *gone)  # as if killed after the checkpoint before the last
    assert ends_at(launch("stopped", *STOPS)) == step
    assert (stopped / "model.safetensors").read_bytes() == weights


def test_a_score_of_the_answers_may_decide_which_step_is_the_best(settings, tmp_path, capsys):
    by_score = [*settings, "evaluation.questions=4", "generation.max_new_tokens=6", STOPS[1]]
    more = ("training.metric_for_best_model=char_f1", "training.max_steps=8")
    run = train(tmp_path / "run", by_score, *more)
    assert "and at each evaluation" in capsys.readouterr().out
    steps, scores = RunFolder(run).curve("eval_char_f1")
    assert steps == [0, 2, 4, 6, 8] and len(set(scores)) > 1
    best = max(scores[1:])
    kept = RunFolder(run).environment["kept_step"]
    assert kept == steps[1:][scores[1:].index(best)]
    trained = RunFolder(run).evaluation["scores"]["trained"]["char_f1"]["mean"]
    assert trained == pytest.approx(best)
    best_weights = (run / f"checkpoint-{kept}" / "model.safetensors").read_bytes()
    assert (run / "model.safetensors").read_bytes() == best_weights


def test_a_score_needs_questions(call, settings, tmp_path):
    more = (*settings, STOPS[1], "training.metric_for_best_model=chrf")
    done = call(sft, "--check", QUICKSTART, f"training.output_dir={tmp_path / 'run'}", *more)
    assert "is chrf, a score of answers, but evaluation.questions is 0" in error_of(done)
