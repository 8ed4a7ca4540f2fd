"""A comparison as comparison.csv, .json and .png."""

import csv
import json
import math
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.evaluation.compared_run import Run
from finetuning.evaluation.comparison import Rows, seed_table, table_of
from finetuning.evaluation.comparison_plot import plot_runs
from finetuning.files import write_text
from finetuning.untrusted_text import short_line


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
