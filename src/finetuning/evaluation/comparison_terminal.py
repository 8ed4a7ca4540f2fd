"""A comparison in the terminal: tables as wide as it is."""

import itertools
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from finetuning.evaluation.compared_run import Run
from finetuning.evaluation.comparison import (
    DEVIATION,
    HIGH,
    LOW,
    SEEDS,
    Rows,
    cell,
    differing,
    scores_of,
    seed_table,
    short,
    table_of,
)
from finetuning.evaluation.scores import SCORES
from finetuning.evaluation.table import mean as mean_and_interval
from finetuning.evaluation.table import with_interval


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

    A name or a part of it on a line: rich would cut names where two lines could be had.
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
