"""One run of a comparison: its settings, its figures, its scores, and how far it is."""

import os
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.evaluation.results import TRAINED
from finetuning.evaluation.scores import SCORES
from finetuning.runs.folder import RunFolder

# Column and the figure of metrics.jsonl whose last value stands there.
FIGURES = {
    "train loss": "loss",
    "evaluation loss": "eval_loss",
    "evaluation accuracy": "eval_mean_token_accuracy",
    "tokens/s": "tokens_per_second",
}
# The same, of preference tuning only.
FIGURES_OF_PAIRS = {
    "reward accuracy": "eval_rewards/accuracies",
    "reward margin": "eval_rewards/margins",
}


class Run(RunFolder):
    """One run of a comparison."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting of recipe.yaml as section.key: value."""
        return dict(flat(self.recipe.resolved()))

    @property
    def hours(self) -> float | None:
        """How long it ran, all launches together; None where that was not noted.

        What a launch that was killed had done is not in it.
        """
        return sum(hours for hours, _ in self.durations) if self.durations else None

    @property
    def gpu_hours(self) -> float | None:
        return sum(hours * gpus for hours, gpus in self.durations) if self.durations else None

    @cached_property
    def durations(self) -> list[tuple[float, int]]:
        """(hours, GPUs) of every launch whose end was noted."""
        launches = self.environment.get("launches") or []
        finished = self.environment.get("finished")
        found = []
        for launch in launches:
            is_last = launch is launches[-1]
            start, end = launch.get("started"), launch.get("ended") or (is_last and finished)
            if not (start and end):
                continue
            passed = datetime.fromisoformat(end) - datetime.fromisoformat(start)
            gpus = 0 if launch.get("device") == "cpu" else launch.get("processes", 1)
            found.append((passed.total_seconds() / 3600, gpus))
        return found

    @property
    def results(self) -> dict[str, float | None]:
        """{column: what came of it}, without scores."""
        every = {**FIGURES, **FIGURES_OF_PAIRS}
        figures = {column: self.last(figure) for column, figure in every.items()}
        return {**figures, "hours": self.hours, "GPU hours": self.gpu_hours}

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """{score: {mean, low, high}} of its answers to its evaluation set; nothing without them."""
        evaluation = self.evaluation or {"scores": {}}
        found = evaluation["scores"].get(TRAINED, {})
        return {name: found[name] for name in SCORES if name in found}

    @property
    def state(self) -> str:
        """finished, or how far it is."""
        if self.is_finished:
            return "finished"
        return f"step {self.metrics[-1]['step']}" if self.metrics else "not begun"


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(section.key, value) of nested settings."""
    pairs = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        pairs += flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return pairs


def find_runs(names: list[str]) -> list[Run]:
    """The run folders that were named, and those in a folder that was named, in natural order.

    Raises UserError for a folder that is none and has none in it.
    """
    found = []
    for path in map(Path, names):
        is_run = (path / "recipe.yaml").is_file()
        inside = [path] if is_run else [file.parent for file in path.glob("*/recipe.yaml")]
        if not inside:
            raise UserError(
                f"{path} is not a run folder and holds none: "
                "there is no recipe.yaml in it or one level below"
            )
        found += sorted(inside, key=lambda folder: (len(folder.name), folder.name))
    return [Run(folder) for folder in dict.fromkeys(found)]


def common_folder(runs: list[Run]) -> Path:
    """The nearest folder that holds all of them."""
    return Path(os.path.commonpath([run.path.absolute().parent for run in runs]))
