"""What a person sees of the steps: a line for each log, and a bar where there is a terminal."""

import sys
import time
from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers import TrainerCallback


class ProgressLines(TrainerCallback):
    """Aligned columns, the same in a terminal and in the log of a batch job; a bar in terminals
    only.

    In place of transformers' own, which prints dictionaries of quoted strings and a bar for each
    evaluation. metrics.jsonl has every figure in full.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Any = None
        self.first_step = 0
        self.since: float | None = None
        """when that step began, by time.perf_counter"""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self.since = None
        if not state.is_world_process_zero:
            return
        self.print(state, "step", "epoch", "loss", "accuracy", "rate", "tokens/s", "left")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            disable=args.disable_tqdm or None,  # None: where there is no terminal
            leave=False,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {remaining} left",
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.since is None:
            self.first_step, self.since = state.global_step, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.print(state, *figures(state, logs, "eval_"), f"  evaluation, {measured(logs)}")
        elif "loss" in logs:
            rate, speed = f"{logs['learning_rate']:.1e}", f"{logs['tokens_per_second']:,.0f}"
            self.print(state, *figures(state, logs), rate, speed, self.time_left(state))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; also for a training that ends in an exception."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def time_left(self, state: Any) -> str:
        """At the speed so far, evaluations and checkpoints included."""
        done = state.global_step - self.first_step
        if self.since is None or not done:
            return "?"
        seconds = (time.perf_counter() - self.since) / done
        return str(tqdm.format_interval(seconds * (state.max_steps - state.global_step)))

    def print(self, state: Any, step: str, epoch: str, *columns: str) -> None:
        width = max(len("step"), 2 * len(str(state.max_steps)) + 1)
        line = f"{step:>{width}} {epoch:>7}" + "".join(f"{column:>10}" for column in columns)
        with tqdm.external_write_mode(file=sys.stdout):
            self.console.print(line)


def figures(state: Any, logs: dict[str, float], prefix: str = "") -> list[str]:
    """Step, epoch, loss and accuracy of a log: of rewards, or of tokens."""
    names = (f"{prefix}rewards/accuracies", f"{prefix}mean_token_accuracy")
    accuracy = next(logs[name] for name in names if name in logs)
    return [
        f"{state.global_step}/{state.max_steps}",
        f"{state.epoch or 0.0:.2f}",
        f"{logs[f'{prefix}loss']:.4f}",
        f"{accuracy:.1%}",
    ]


def measured(logs: dict[str, float]) -> str:
    """What an evaluation has beside loss and accuracy."""
    if "eval_perplexity" in logs:
        return f"perplexity {logs['eval_perplexity']:,.4g}"
    return f"margin {logs['eval_rewards/margins']:,.4g}"
