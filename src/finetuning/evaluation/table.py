"""An evaluation as a terminal shows it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from finetuning.evaluation.intervals import Mean
from finetuning.evaluation.results import BASE, TRAINED
from finetuning.evaluation.scores import BETTER_IF_HIGHER, SCORES
from finetuning.runs.folder import RunFolder

MAX_COLUMNS = 12  # of a confusion table
SHOWN, MAX_CHARACTERS = 5, 200  # answers that changed most, and of each of them


def print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Each score of each model with its interval, and where one is better than the first."""
    first, *others = evaluation["names"]
    table = Table(f"{evaluation['questions']:,} answers", first)
    for other in others:
        table.add_column(other)
        table.add_column("difference")
    for name, label in SCORES.items():
        cells = [with_interval(mean(evaluation["scores"][first][name]))]
        for other in others:
            difference = mean(evaluation["differences"][other][name])
            cells.append(with_interval(mean(evaluation["scores"][other][name])))
            cells.append(f"{with_interval(difference, '+')} {verdict(name, difference)}".strip())
        table.add_row(label, *cells)
    console.print(table, soft_wrap=False)
    console.print(
        f"of {evaluation['of']:,}; percent [95 % bootstrap interval]; length 100 is the reference's"
    )
    if evaluation["labels"]:
        print_labels(console, evaluation["labels"])


class ScoreRow(NamedTuple):
    """A score of a run's base and trained model, as it is shown."""

    label: str
    base: str
    trained: str
    difference: str
    verdict: str
    """better, worse or nothing"""


def score_rows(evaluation: Mapping[str, Any] | None) -> list[ScoreRow]:
    """Of a run's own evaluation; nothing without one."""
    scores = evaluation["scores"] if evaluation else {}
    base, trained = scores.get(BASE, {}), scores.get(TRAINED, {})
    differences = evaluation["differences"].get(TRAINED, {}) if evaluation else {}
    rows = []
    for name, label in SCORES.items():
        if name not in trained:
            continue
        gain = mean(differences[name]) if name in differences else None
        rows.append(
            ScoreRow(
                label,
                with_interval(mean(base[name])) if name in base else "-",
                with_interval(mean(trained[name])),
                with_interval(gain, "+") if gain else "-",
                verdict(name, gain) if gain else "",
            )
        )
    return rows


def print_changed(console: Console, folder: Path, evaluation: Mapping[str, Any]) -> None:
    """The answers whose chrF differs most between the first model and the last."""
    first, last = evaluation["names"][0], evaluation["names"][-1]
    lines = RunFolder(folder).answers
    if first == last or not lines:
        return
    table = Table("question", "reference", first, last, "chrF", show_lines=True)
    for line in most_changed(lines, first, last):
        answers = line["answers"]
        change = change_of(line, first, last)
        said = [shortened(answers[model]["text"]) for model in (first, last)]
        question = shortened(line["messages"][-1]["content"] if line["messages"] else "")
        table.add_row(question, shortened(line["reference"]), *said, f"{change:+.0f}")
    console.print(table, soft_wrap=False)


def most_changed(
    lines: Sequence[dict[str, Any]], first: str, last: str, number: int = SHOWN
) -> list[dict[str, Any]]:
    """What became worse by most comes first, what became better by most last."""
    chosen = sorted(lines, key=lambda line: -abs(change_of(line, first, last)))[:number]
    return sorted(chosen, key=lambda line: change_of(line, first, last))


def change_of(line: Mapping[str, Any], first: str, last: str) -> float:
    answers = line["answers"]
    change: float = answers[last]["scores"]["chrf"] - answers[first]["scores"]["chrf"]
    return change


def shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


def print_labels(console: Console, labels: Mapping[str, Any]) -> None:
    """Of each label, how often it was answered by each."""
    for model, accuracy in labels["accuracy"].items():
        console.print(f"accuracy of {model}: {accuracy:.1f} % of {len(labels['labels'])} labels")
        if len(labels["answers"]) > MAX_COLUMNS:
            continue
        table = Table(r"expected \ answered", *labels["answers"])
        for label, counts in zip(labels["labels"], labels["confusion"][model], strict=True):
            table.add_row(label, *map(str, counts))
        console.print(table, soft_wrap=False)


def mean(record: Mapping[str, float]) -> Mean:
    return Mean(record["mean"], record["low"], record["high"])


def with_interval(value: Mean, sign: str = "") -> str:
    """So short that a table of two models has 80 columns."""
    digits = 1 if abs(value.mean) < 99.95 else 0
    low, high = (f"{bound:.{int(abs(bound) < 9.95)}f}" for bound in (value.low, value.high))
    return f"{value.mean:{sign}.{digits}f} [{low}, {high}]"


def verdict(name: str, difference: Mean) -> str:
    """Only where the interval leaves zero out."""
    if name not in BETTER_IF_HIGHER:
        return ""
    if difference.is_above_zero:
        return "better"
    return "worse" if difference.is_below_zero else ""
