"""preview/report.html: the data on one page that needs no network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetuning.runs.doctor import KINDS, Finding, Shown

PAGE = Path(__file__).with_name("report.html")
BINS = 40
MAX_GROUPS = 100  # of a kind that the page has
MAX_TOGETHER = 8  # examples of a group
MAX_EXAMPLES = 300  # that the page has beside those of the findings
PLACE = "__DATA__"  # in the page


def report_page(
    report: dict[str, Any],
    lengths: NDArray[np.int64],
    examples: Sequence[Shown],
    findings: Sequence[Finding],
) -> str:
    """The page as text.

    Rows are others': they stand in it as JSON without a character that is markup, and the page's
    program shows them as text. Its policy lets nothing be loaded.
    """
    found = [entry_of(finding) for finding in findings if finding.groups]
    needed = {number for entry in found for group in entry["groups"] for number in group}
    needed |= {example.number for example in examples[:MAX_EXAMPLES]}
    data = {
        "report": report,
        "histogram": histogram(lengths),
        "looked_at": len(examples),
        "findings": found,
        "examples": [as_plain(example) for example in examples if example.number in needed],
    }
    return PAGE.read_text(encoding="utf-8").replace(PLACE, without_markup(data))


def histogram(lengths: NDArray[np.int64]) -> dict[str, list[float]]:
    counts, borders = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    return {"counts": counts.tolist(), "borders": borders.tolist()}


def entry_of(finding: Finding) -> dict[str, Any]:
    """A finding with as many groups, and of each as many examples, as the page has."""
    return {
        "kind": finding.kind,
        "text": KINDS[finding.kind],
        "count": len(finding.groups),
        "groups": [group[:MAX_TOGETHER] for group in finding.groups[:MAX_GROUPS]],
    }


def as_plain(example: Shown) -> dict[str, Any]:
    return {
        "number": example.number,
        "row": example.row,
        "split": example.split,
        "parts": list(example.parts),
    }


def without_markup(data: Any) -> str:
    r"""JSON in which `<`, `>` and `&` are written \u003c and so on; the ASCII of anything else."""
    text = json.dumps(data)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
