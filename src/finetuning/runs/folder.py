"""The run folder: what one run leaves behind, enough to ask, publish or resume it.

recipe.yaml       every setting, as resolved
environment.json  versions, git revision, data, launches
metrics.jsonl     one JSON object per logged step
samples.md        answers before and after, samples.json too
answers.jsonl     answers to the evaluation set, base and trained, with their scores
evaluation.json   the scores' means with intervals
reference.npz     of preference tuning: log-probabilities before the first step
checkpoint-N/     to resume from
model.safetensors or adapter_model.safetensors, tokenizer.json, ...
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from finetuning.model.tokenizer import read_tokenizer
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.environment import read_environment
from finetuning.runs.metrics import read_lines, read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANSWERS, EVALUATION, REFERENCE = "answers.jsonl", "evaluation.json", "reference.npz"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class IntervalRecord:
    """A mean, and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationRecord:
    """What evaluation.json has at least; evaluation/results.py writes it."""

    questions: int
    of: int
    names: list[str]
    scores: dict[str, dict[str, IntervalRecord]]
    differences: dict[str, dict[str, IntervalRecord]]


@dataclass(frozen=True)
class RunFolder:
    """A run folder that is only read: each of its files once, when it is first asked for."""

    path: Path

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self.path / "recipe.yaml")

    @cached_property
    def environment(self) -> dict[str, Any]:
        return read_environment(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return read_tokenizer(str(self.path))

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """evaluation.json; None for a run without one, or where it is damaged."""
        try:
            found: dict[str, Any] = json.loads((self.path / EVALUATION).read_text("utf-8"))
            TypeAdapter(EvaluationRecord).validate_python(found)
        except (OSError, ValueError):  # pydantic's error is a ValueError
            return None
        return found

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """The lines of answers.jsonl; nothing without it."""
        return read_lines(self.path / ANSWERS)

    @property
    def is_finished(self) -> bool:
        return bool(self.environment.get("finished"))

    def curve(self, figure: str) -> tuple[list[int], list[float]]:
        """(steps, values) wherever the figure was logged."""
        known = [line for line in self.metrics if line.get(figure) is not None]
        points = {line["step"]: line[figure] for line in known}
        return list(points), list(points.values())

    def last(self, figure: str) -> float | None:
        """The figure's last value, None where it was never logged."""
        return next(iter(self.curve(figure)[1][::-1]), None)


def has_model(folder: Path) -> bool:
    return any((folder / weights).exists() for weights in WEIGHTS)
