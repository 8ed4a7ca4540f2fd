"""The lines of a training: aligned, at most 80 columns, and no bar where there is no terminal."""

import io
import sys

import pytest
from rich.console import Console
from transformers import TrainerState, TrainingArguments

from finetuning.training.progress import ProgressLines

STEP = {
    "loss": 5.0949,
    "learning_rate": 1.97e-3,
    "mean_token_accuracy": 0.3287,
    "tokens_per_second": 31905.4,
}
EVALUATION = {"eval_loss": 123.5, "eval_perplexity": 1e6, "eval_mean_token_accuracy": 1.0}


class Training:
    """The events of a training, in transformers' order, and what is printed meanwhile."""

    def __init__(self, max_steps: int, rank: int = 0, begin: int = 0) -> None:
        self.output = io.StringIO()
        self.lines = ProgressLines(Console(file=self.output, width=80))
        self.args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
        self.state = TrainerState(
            max_steps=max_steps, global_step=begin, is_world_process_zero=rank == 0
        )
        self.lines.on_train_begin(self.args, self.state, None)

    def step(self, epoch: float = 1.0, **logs: float) -> None:
        self.lines.on_step_begin(self.args, self.state, None)
        self.state.global_step += 1
        self.state.epoch = epoch
        self.lines.on_step_end(self.args, self.state, None)
        if logs:
            self.lines.on_log(self.args, self.state, None, logs=logs)

    def printed(self) -> list[str]:
        return self.output.getvalue().splitlines()


@pytest.mark.parametrize("max_steps", [3, 200, 1_000_000])
def test_columns_stand_below_each_other_within_80(max_steps):
    training = Training(max_steps)
    training.step(**STEP)
    training.step(epoch=12.5, **EVALUATION)
    head, step, evaluation = training.printed()
    assert head.split() == ["step", "epoch", "loss", "accuracy", "rate", "tokens/s", "left"]
    for name, cells in {
        "step": (f"1/{max_steps}", f"2/{max_steps}"),
        "epoch": ("1.00", "12.50"),
        "loss": ("5.0949", "123.5000"),
        "accuracy": ("32.9%", "100.0%"),
    }.items():
        end = head.index(name) + len(name)
        assert step[:end].endswith(cells[0]) and evaluation[:end].endswith(cells[1]), name
    assert step.split()[4:6] == ["2.0e-03", "31,905"]
    assert evaluation.endswith("evaluation, perplexity 1e+06")
    assert max(map(len, training.printed())) <= 80


def test_the_time_left_is_that_of_the_steps_left_at_the_speed_so_far(monkeypatch):
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr("finetuning.training.progress.time.perf_counter", lambda: next(clock))
    resumed = Training(400, begin=398 - 360)
    resumed.step(**STEP)  # 10 s
    assert resumed.printed()[-1].endswith(" 1:00:10")
    resumed.step(**STEP)  # two in 20 s
    assert resumed.printed()[-1].endswith(" 1:00:00")


def test_only_the_first_process_speaks():
    training = Training(3, rank=1)
    training.step(**STEP)
    training.step(**EVALUATION)
    assert training.printed() == [] and training.lines.bar is None


def test_there_is_a_bar_in_a_terminal_only_and_it_is_taken_away(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", silent := io.StringIO())
    training = Training(3)
    training.step(**STEP)
    training.lines.close()
    assert silent.getvalue() == ""

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    training = Training(3)
    training.step(**STEP)
    assert "0/3" in terminal.getvalue()
    training.lines.close()
    assert terminal.getvalue().rstrip(" ").endswith("\r") and training.lines.bar is None
