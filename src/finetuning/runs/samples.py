"""samples.json and samples.md: the recipe's questions, answered before and after training."""

import json
from pathlib import Path
from typing import NamedTuple

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.untrusted_text import inline, printable


class Sample(NamedTuple):
    """One question that the recipe asks."""

    question: str
    before: str | None
    """None where it was not asked before training, or what it said is lost"""
    after: str | None = None
    """None as long as the run is not finished"""


def write_samples(folder: Path, samples: list[Sample]) -> None:
    """samples.json, and samples.md to read."""
    write_text(
        folder / "samples.json",
        json.dumps([s._asdict() for s in samples], indent=1, ensure_ascii=False) + "\n",
    )
    parts = ["# Answers before and after training\n", *sample_parts(samples)]
    write_text(folder / "samples.md", "\n".join(parts))


def sample_parts(samples: list[Sample]) -> list[str]:
    """Markdown of each sample: its question as a heading, the answers as code."""
    parts = []
    for question, before, after in samples:
        first = "(not asked)" if before is None else before
        last = "(not yet)" if after is None else after
        answers = f"Before:\n\n{quoted(first)}\n\nAfter:\n\n{quoted(last)}\n"
        parts.append(f"## {inline(question)}\n\n{answers}")
    return parts


def read_samples(folder: Path) -> list[Sample]:
    """What samples.json holds. Raises UserError if it is damaged."""
    samples = known_samples(folder)
    if samples is None:
        raise UserError(
            f"{folder / 'samples.json'} is damaged; src/generate.py asks the model anew"
        )
    return samples


def known_samples(folder: Path) -> list[Sample] | None:
    """As read_samples, but None if it is damaged."""
    file = folder / "samples.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        return [Sample(**entry) for entry in entries]
    except (ValueError, TypeError, IsADirectoryError):
        return None


def quoted(text: str) -> str:
    """The text as a code block of Markdown, without control characters."""
    return "\n".join(f"    {printable(line)}" for line in text.splitlines() or [""])
