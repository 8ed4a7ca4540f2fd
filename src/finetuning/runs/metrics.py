"""metrics.jsonl: one JSON object for each logged step."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetuning.files import write_text


def append_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line_of(metrics) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds; a line that a killed run left unfinished is passed over."""
    return [entry for entry in read_lines(folder / "metrics.jsonl") if "step" in entry]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON object of each line; one that a killed run left unfinished is passed over."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    entries = []
    for line in text.split("\n"):
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    write_text(folder / "metrics.jsonl", "".join(line_of(metrics) + "\n" for metrics in history))


def line_of(metrics: dict[str, Any]) -> str:
    """One line of JSON, which knows neither NaN nor infinity: they are null."""
    numbers = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(numbers, allow_nan=False)
