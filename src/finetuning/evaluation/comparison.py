"""Run folders side by side: what was set and what came of it in tables, the losses in a plot.

Tables are (columns, rows). A number that is known with an interval has three columns: `chrf`,
`chrf low` and `chrf high`.
"""

import csv
import itertools
import json
import math
import os
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from finetuning.errors import UserError, did_you_mean
from finetuning.evaluation.results import TRAINED
from finetuning.evaluation.scores import BETTER_IF_HIGHER, SCORES
from finetuning.evaluation.table import mean as mean_and_interval
from finetuning.evaluation.table import with_interval
from finetuning.files import write_text
from finetuning.runs.folder import RunFolder
from finetuning.runs.plots import label, pyplot
from finetuning.untrusted_text import printable, short_line

NOT_COMPARED = ("training.output_dir",)
DEVIATION = " sd"  # ends the column of a standard deviation
LOW, HIGH = " low", " high"  # end the columns of an interval
STATE = "state"
SEEDS = ("training.seed", "training.data_seed")

# Column and the figure of metrics.jsonl whose last value stands there.
FIGURES = {
    "train loss": "loss",
    "evaluation loss": "eval_loss",
    "evaluation accuracy": "eval_mean_token_accuracy",
    "tokens/s": "tokens_per_second",
}
HIGHEST_FIRST = ("evaluation accuracy", "tokens/s", "ended", *BETTER_IF_HIGHER)


Rows = tuple[list[str], list[list[Any]]]
"""(columns, rows) of a table"""


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
        found = []
        for launch in launches:
            end = launch.get("ended") or (
                self.environment.get("finished") if launch is launches[-1] else None
            )
            if end and launch.get("started"):
                passed = datetime.fromisoformat(end) - datetime.fromisoformat(launch["started"])
                gpus = 0 if launch.get("device") == "cpu" else launch.get("processes", 1)
                found.append((passed.total_seconds() / 3600, gpus))
        return found

    @property
    def results(self) -> dict[str, float | None]:
        """{column: what came of it}, without scores."""
        figures = {column: self.last(figure) for column, figure in FIGURES.items()}
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
        pairs += (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else [(f"{prefix}{key}", value)]
        )
    return pairs


def find_runs(names: list[str]) -> list[Run]:
    """The run folders that were named, and those in a folder that was named, in natural order.

    Raises UserError for a folder that is none and has none in it.
    """
    found = []
    for path in map(Path, names):
        inside = (
            [path]
            if (path / "recipe.yaml").is_file()
            else [file.parent for file in path.glob("*/recipe.yaml")]
        )
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


def differing(runs: list[Run]) -> list[str]:
    """The settings that are not the same in all runs."""
    every = dict.fromkeys(name for run in runs for name in run.settings if name not in NOT_COMPARED)
    return [
        name
        for name in every
        if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)
    ]


def table_of(runs: list[Run], by: str | None = None) -> Rows:
    """The settings in which runs differ, their figures and their scores; the best first.

    `by` is a column to sort by instead of the evaluation loss. Raises UserError for another name.
    """
    names, scores = differing(runs), scores_of(runs)
    bounds = [f"{name}{end}" for name in scores for end in ("", LOW, HIGH)]
    columns = ["run", *names, *runs[0].results, STATE, *bounds]
    rows = []
    for run in sorted(runs, key=rank):
        settings = [run.settings.get(name) for name in names]
        known = [run.scores.get(name, {}) for name in scores]
        intervals = [score.get(part) for score in known for part in ("mean", "low", "high")]
        name = name_of(run, runs)
        rows.append([name, *settings, *run.results.values(), run.state, *intervals])
    return columns, rows if by is None else sorted_by(by, columns, rows)


def scores_of(runs: list[Run]) -> list[str]:
    """Those that one of the runs has."""
    return [name for name in SCORES if any(name in run.scores for run in runs)]


def sorted_by(by: str, columns: list[str], rows: list[list[Any]]) -> list[list[Any]]:
    """The best, or else the least, of a column first; runs without a number there last."""
    names = {**{short(name): name for name in columns}, **dict(zip(columns, columns, strict=True))}
    if by not in names:
        hint = did_you_mean(by, names)
        shown = ", ".join(name for name in columns if not name.endswith((LOW, HIGH)))
        raise UserError(f"--by {by}: no such column; there are {shown}{hint}")
    column, sign = columns.index(names[by]), -1 if names[by] in HIGHEST_FIRST else 1

    def place(row: list[Any]) -> tuple[int, Any]:
        value = row[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return 2, 0
        return (0, sign * value) if isinstance(value, int | float) else (1, str(value))

    return sorted(rows, key=place)


def seed_table(runs: list[Run]) -> Rows | None:
    """Mean and standard deviation of runs that differ in nothing but their seed.

    None where there are no two such runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=rank):
        same = {k: v for k, v in run.settings.items() if k not in (*NOT_COMPARED, *SEEDS)}
        groups.setdefault(repr(same), []).append(run)
    seeds = [group for group in groups.values() if len(group) > 1]
    if not seeds:
        return None
    names = [name for name in differing(runs) if name not in SEEDS]
    results = [*runs[0].results, *scores_of(runs)]
    columns = ["seeds", *names, *(f"{name}{end}" for name in results for end in ("", DEVIATION))]
    rows = []
    for group in seeds:
        spreads = [spread([result_of(run, name) for run in group]) for name in results]
        settings = [group[0].settings.get(name) for name in names]
        rows.append([len(group), *settings, *(number for pair in spreads for number in pair)])
    return columns, rows


def result_of(run: Run, name: str) -> float | None:
    return run.scores[name]["mean"] if name in run.scores else run.results.get(name)


def spread(values: list[float | None]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of the values that are known; None of too few."""
    known = [value for value in values if value is not None]
    if not all(map(math.isfinite, known)):
        return math.nan, math.nan
    return mean(known) if known else None, stdev(known) if len(known) > 1 else None


def rank(run: Run) -> list[float]:
    """By loss of the evaluation set, then of training; without one, or where it is NaN, last."""
    losses = [run.last(figure) for figure in ("eval_loss", "loss")]
    return [math.inf if loss is None or math.isnan(loss) else loss for loss in losses]


def name_of(run: Run, runs: list[Run]) -> str:
    """The folder's path below what holds them all."""
    return run.path.absolute().relative_to(common_folder(runs)).as_posix()


def print_runs(console: Console, runs: list[Run], by: str | None = None) -> None:
    """A line for each run, and below it one for the runs that differ in their seed only."""
    columns, rows = table_of(runs, by)
    print_table(console, *with_intervals(columns, rows), len(differing(runs)))
    if scores_of(runs):
        console.print("scores in percent, with 95 % bootstrap intervals: docs/evaluation.md")
    if found := seed_table(runs):
        console.print("mean ± standard deviation over seeds")
        print_table(console, *with_deviations(*found), len(set(differing(runs)) - set(SEEDS)))


def with_intervals(columns: list[str], rows: list[list[Any]]) -> Rows:
    """The same with one column for a number and its interval."""
    kept = [n for n, name in enumerate(columns) if not name.endswith((LOW, HIGH))]

    def joined(row: list[Any], number: int) -> Any:
        if f"{columns[number]}{LOW}" not in columns or row[number] is None:
            return row[number]
        low, high = row[number + 1 : number + 3]
        return with_interval(mean_and_interval({"mean": row[number], "low": low, "high": high}))

    return [columns[n] for n in kept], [[joined(row, n) for n in kept] for row in rows]


def with_deviations(columns: list[str], rows: list[list[Any]]) -> Rows:
    """The same with one column for a mean and its standard deviation."""
    kept = [n for n, name in enumerate(columns) if not name.endswith(DEVIATION)]

    def joined(row: list[Any], number: int) -> Any:
        if f"{columns[number]}{DEVIATION}" not in columns or row[number + 1] is None:
            return row[number]
        return f"{cell(row[number])} ± {cell(row[number + 1])}"

    return [columns[n] for n in kept], [[joined(row, n) for n in kept] for row in rows]


def print_table(console: Console, columns: list[str], rows: list[list[Any]], settings: int) -> None:
    """One table, or where that is too wide several: settings that differ, figures, scores."""
    table = text_table([short(column) for column in columns], rows)
    if fits(console, table):
        console.print(table, soft_wrap=False)
        return
    scores = next((n for n, name in enumerate(columns) if name in SCORES), len(columns))
    for start, end in itertools.pairwise([1, 1 + settings, scores, len(columns)]):
        while start < end:
            ends = range(start + 1, end + 1)
            tables = [narrow_table(columns, rows, start, stop) for stop in ends]
            count = max(1, sum(itertools.takewhile(bool, (fits(console, one) for one in tables))))
            console.print(tables[count - 1], soft_wrap=False)
            start += count


def fits(console: Console, table: Table) -> bool:
    wide = console.options.update(max_width=10_000)
    return console.measure(table, options=wide).maximum <= console.width


def narrow_table(columns: list[str], rows: list[list[Any]], start: int, end: int) -> Table:
    """The name of each run and some of the columns.

    A word or a part of it on a line: rich would cut words where two lines could be had.
    """
    heads = [short(name).replace("_", "_\n").replace(" ", "\n") for name in columns[start:end]]
    return text_table(
        [columns[0], *heads], [[row[0], *map(broken, row[start:end])] for row in rows]
    )


def broken(value: Any) -> Any:
    """What is known with an interval, on two lines."""
    return value.replace(" [", "\n[") if isinstance(value, str) else value


def text_table(columns: list[str], rows: list[list[Any]]) -> Table:
    table = Table(columns[0], *(Column(name, overflow="ellipsis") for name in columns[1:]))
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return "-" if value is None else printable(str(value))


def short(setting: str) -> str:
    return setting.removeprefix("training.")


def label_of(run: Run, runs: list[Run]) -> str:
    """The run's name and what sets it apart."""
    settings = [f"{short(name)}={cell(run.settings.get(name))}" for name in differing(runs)]
    return ", ".join([name_of(run, runs), *settings])


def write_comparison(runs: list[Run], folder: Path, by: str | None = None) -> None:
    """comparison.csv, .json and .png. Raises UserError where they cannot be written."""
    seeds = seed_table(runs)
    try:
        write_csv(table_of(runs, by), folder / "comparison.csv")
        if seeds:
            write_csv(seeds, folder / "comparison_seeds.csv")
        found = {"runs": records(table_of(runs, by)), "seeds": records(seeds) if seeds else []}
        write_text(folder / "comparison.json", json.dumps(found, indent=1, ensure_ascii=False))
        plot_runs(runs, folder / "comparison.png")
    except OSError as error:
        raise UserError(f"{folder}: the comparison cannot be written: {error.strerror}") from None


def records(table: Rows) -> list[dict[str, Any]]:
    """A table for JSON, which has no NaN."""
    columns, rows = table
    return [dict(zip(columns, map(finite, row), strict=True)) for row in rows]


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(table: Rows, file: Path) -> None:
    columns, rows = table
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([map(csv_cell, row) for row in (columns, *rows)])


def csv_cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula begins with an apostrophe instead."""
    if isinstance(value, str | list | dict):
        text = short_line(str(value))
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return value


def plot_runs(runs: list[Run], file: Path) -> None:
    """Training loss and evaluation loss over the steps, a line for each run, and their scores."""
    plt = pyplot()
    scores = [name for name in scores_of(runs) if name in BETTER_IF_HIGHER]
    count = 3 if scores else 2
    size = (5.5 * count, 4.5 + 0.12 * len(runs))
    figure, panels = plt.subplots(1, count, figsize=size, layout="constrained")
    curves = (("loss", "training loss"), ("eval_loss", "evaluation loss"))
    colours = [plt.get_cmap("viridis")(0.9 * n / max(1, len(runs) - 1)) for n in range(len(runs))]
    for panel, (name, loss) in zip(panels, curves, strict=False):
        for run, colour in zip(runs, colours, strict=True):
            panel.plot(*run.curve(name), color=colour, marker=".", label=label_of(run, runs))
        panel.set_xlabel(label("step"))
        panel.set_ylabel(label(loss))
    if scores:
        plot_scores(panels[2], runs, scores, colours)
    legend = figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a setting is not the beginning of a formula
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_scores(panel: Any, runs: list[Run], names: list[str], colours: list[Any]) -> None:
    """The mean of each score with its interval, the runs beside each other."""
    for number, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        shift = 0.7 * ((number + 0.5) / len(runs) - 0.5)
        known = [(n, run.scores[name]) for n, name in enumerate(names) if name in run.scores]
        places = [place + shift for place, _ in known]
        means = [score["mean"] for _, score in known]
        # A mean may lie outside its percentile interval by rounding.
        below = [max(0, score["mean"] - score["low"]) for _, score in known]
        above = [max(0, score["high"] - score["mean"]) for _, score in known]
        panel.errorbar(places, means, yerr=[below, above], color=colour, fmt="o", capsize=3)
    panel.set_xticks(range(len(names)), [SCORES[name] for name in names])
    panel.set_ylabel(label("percent"))
