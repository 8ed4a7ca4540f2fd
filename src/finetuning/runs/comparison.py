"""Run folders side by side: a table of what was set and what came of it, a plot of the losses."""

import csv
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

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.runs.folder import RunFolder
from finetuning.runs.plots import label, pyplot
from finetuning.untrusted_text import printable, short_line

NOT_COMPARED = ("training.output_dir",)
DEVIATION = " sd"  # ends the column of a standard deviation
SEEDS = ("training.seed", "training.data_seed")

# Column and the figure of metrics.jsonl whose last value stands there.
FIGURES = {
    "train loss": "loss",
    "evaluation loss": "eval_loss",
    "evaluation accuracy": "eval_mean_token_accuracy",
    "tokens/s": "tokens_per_second",
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
        """{column: what came of it}"""
        figures = {column: self.last(figure) for column, figure in FIGURES.items()}
        return {**figures, "hours": self.hours, "GPU hours": self.gpu_hours}

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


def table_of(runs: list[Run]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): the settings in which runs differ, then their figures; the best first."""
    names = differing(runs)
    columns = ["run", *names, *runs[0].results, "state"]
    rows = []
    for run in sorted(runs, key=rank):
        settings = [run.settings.get(name) for name in names]
        rows.append([name_of(run, runs), *settings, *run.results.values(), run.state])
    return columns, rows


def seed_table(runs: list[Run]) -> tuple[list[str], list[list[Any]]] | None:
    """(columns, rows): mean and standard deviation of runs that differ in nothing but their seed.

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
    results = runs[0].results
    columns = ["seeds", *names, *(f"{name}{end}" for name in results for end in ("", DEVIATION))]
    rows = []
    for group in seeds:
        spreads = [spread([run.results[name] for run in group]) for name in results]
        settings = [group[0].settings.get(name) for name in names]
        rows.append([len(group), *settings, *(number for pair in spreads for number in pair)])
    return columns, rows


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


def print_runs(console: Console, runs: list[Run]) -> None:
    """A line for each run, and below it one for the runs that differ in their seed only."""
    print_table(console, *table_of(runs), len(differing(runs)))
    if found := seed_table(runs):
        console.print("mean ± standard deviation over seeds")
        print_seeds(console, *found, len(set(differing(runs)) - set(SEEDS)))


def print_seeds(console: Console, columns: list[str], rows: list[list[Any]], settings: int) -> None:
    begin = 1 + settings
    heads = [*columns[:begin], *columns[begin::2]]
    cells = [
        [*row[:begin], *map(with_deviation, row[begin::2], row[begin + 1 :: 2])] for row in rows
    ]
    print_table(console, heads, cells, settings)


def with_deviation(number: float | None, deviation: float | None) -> str:
    return cell(number) if deviation is None else f"{cell(number)} ± {cell(deviation)}"


def print_table(console: Console, columns: list[str], rows: list[list[Any]], settings: int) -> None:
    """One table, or where that is too wide two: the settings that differ, then the figures."""
    columns = [short(column) for column in columns]
    table = text_table(columns, rows)
    wide = console.options.update(max_width=10_000)
    if console.measure(table, options=wide).maximum <= console.width:
        console.print(table, soft_wrap=False)
        return
    end = 1 + settings
    for chosen in (slice(1, end), slice(end, None)):
        # A word or a part of it on a line: rich would cut words where two lines could be had.
        heads = [column.replace("_", "_\n").replace(" ", "\n") for column in columns[chosen]]
        cells = [[row[0], *row[chosen]] for row in rows]
        console.print(text_table([columns[0], *heads], cells), soft_wrap=False)


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


def write_comparison(runs: list[Run], folder: Path) -> None:
    """comparison.csv, .json and .png. Raises UserError where they cannot be written."""
    seeds = seed_table(runs)
    try:
        write_csv(table_of(runs), folder / "comparison.csv")
        if seeds:
            write_csv(seeds, folder / "comparison_seeds.csv")
        found = {"runs": records(table_of(runs)), "seeds": records(seeds) if seeds else []}
        write_text(folder / "comparison.json", json.dumps(found, indent=1, ensure_ascii=False))
        plot_runs(runs, folder / "comparison.png")
    except OSError as error:
        raise UserError(f"{folder}: the comparison cannot be written: {error.strerror}") from None


def records(table: tuple[list[str], list[list[Any]]]) -> list[dict[str, Any]]:
    """A table for JSON, which has no NaN."""
    columns, rows = table
    return [dict(zip(columns, map(finite, row), strict=True)) for row in rows]


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(table: tuple[list[str], list[list[Any]]], file: Path) -> None:
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
    """Training loss and evaluation loss over the steps, a line for each run."""
    plt = pyplot()
    colours = plt.get_cmap("viridis")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5 + 0.12 * len(runs)), layout="constrained")
    curves = (("loss", "training loss"), ("eval_loss", "evaluation loss"))
    for panel, (name, loss) in zip(panels, curves, strict=True):
        for number, run in enumerate(runs):
            colour = colours(0.9 * number / max(1, len(runs) - 1))
            panel.plot(*run.curve(name), color=colour, marker=".", label=label_of(run, runs))
        panel.set_xlabel(label("step"))
        panel.set_ylabel(label(loss))
    legend = figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a setting is not the beginning of a formula
    figure.savefig(file, dpi=120)
    plt.close(figure)
