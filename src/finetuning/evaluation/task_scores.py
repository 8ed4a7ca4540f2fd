"""What lm-eval says of each model -> what tasks.json and tasks.jsonl hold, and a terminal shows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from finetuning.evaluation.intervals import Mean, mean_of, paired_difference

AS_IS = ", as is"  # ends the name of a model that is asked as lm-eval does


def summary_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Every metric of every task, of each model; {model: what lm-eval's evaluate() returned}.

    With intervals where a metric is the mean of what it is for each question.
    """
    names = list(found)
    scores: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for task, metric in metrics_of(found[names[0]]):
        each = {name: values_of(found[name], task, metric) for name in names}
        scores.setdefault(task, {})[metric] = {
            name: score_of(found[name]["results"][task][metric], each[name]) for name in names
        }
        differences.setdefault(task, {})[metric] = {
            name: paired_difference(each[name], each[other]).record()
            for name in names
            if (other := compared_with(name, names)) and each[name] and each[other]
        }
    higher = found[names[0]]["higher_is_better"]
    return {"names": names, "scores": scores, "differences": differences, "higher": higher}


def metrics_of(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(task or group, metric), a metric as `acc,none`: with the filter of the answers."""
    for task, metrics in result["results"].items():
        for metric, value in metrics.items():
            is_number = isinstance(value, int | float)
            if "," in metric and "_stderr," not in metric and is_number:
                yield task, metric


def values_of(result: Mapping[str, Any], task: str, metric: str) -> list[float]:
    """Of each question; nothing where the task's value is not their mean."""
    name, _, answers = metric.partition(",")
    samples = result["samples"].get(task, [])
    values = [each.get(name) for each in samples if each["filter"] == answers]
    if not values or not all(isinstance(value, int | float) for value in values):
        return []
    mean = sum(values) / len(values)
    return values if math.isclose(mean, result["results"][task][metric], abs_tol=1e-9) else []


def score_of(value: float, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"value": value, "low": None, "high": None}
    mean = mean_of(values)
    return {"value": value, "low": mean.low, "high": mean.high}


def compared_with(name: str, names: Sequence[str]) -> str | None:
    """Which model a difference is to: as it was trained, or the first one."""
    if name.endswith(AS_IS):
        return name.removesuffix(AS_IS)
    return None if name == names[0] else names[0]


def question_lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What tasks.jsonl holds."""
    results = list(found.values())
    lines = []
    for task, samples in results[0]["samples"].items():
        for number, sample in enumerate(samples):
            same = {name: result["samples"][task][number] for name, result in found.items()}
            lines.append(
                {
                    "task": task,
                    "question": sample["doc_id"],
                    "filter": sample["filter"],
                    "target": sample["target"],
                    "arguments": {name: each["arguments"] for name, each in same.items()},
                    "responses": {name: each["resps"] for name, each in same.items()},
                    "metrics": {
                        metric: {name: each[metric] for name, each in same.items()}
                        for metric in sample["metrics"]
                    },
                }
            )
    return lines


def print_task_scores(console: Console, summary: Mapping[str, Any]) -> None:
    """A table for each metric, a line for each model: readable however long their names are."""
    for task, metrics in summary["scores"].items():
        for metric, scores in metrics.items():
            name = metric.removesuffix(",none").replace(",", ", ")
            table = Table(f"{task}: {name}", "score", "difference")
            for model, score in scores.items():
                gain = summary["differences"][task][metric].get(model)
                higher = summary["higher"].get(task, {}).get(metric.partition(",")[0])
                table.add_row(model, with_bounds(score["value"], score), compared(gain, higher))
            console.print(table, soft_wrap=False)
    console.print("[95 % bootstrap interval]; a difference is to the first model, or of one that")
    console.print("is asked lm-eval's own way (as is) to itself")


def compared(gain: Mapping[str, float] | None, higher: bool | None) -> str:
    """The difference, and better or worse where its interval leaves 0 out."""
    if gain is None:
        return ""
    difference = Mean(gain["mean"], gain["low"], gain["high"])
    text = with_bounds(difference.mean, gain, "+")
    if higher is None or not (difference.is_above_zero or difference.is_below_zero):
        return text
    return f"{text} {'better' if difference.is_above_zero == higher else 'worse'}"


def with_bounds(value: float, bounds: Mapping[str, float | None], sign: str = "") -> str:
    text = f"{value:{sign}.3g}"
    if bounds["low"] is None or bounds["high"] is None:
        return text
    return f"{text} [{bounds['low']:.3g}, {bounds['high']:.3g}]"
