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
    counts, borders = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    shown_groups = {
        finding.kind: [group[:MAX_TOGETHER] for group in finding.groups[:MAX_GROUPS]]
        for finding in findings
    }
    numbers = {number for groups in shown_groups.values() for group in groups for number in group}
    numbers |= {example.number for example in examples[:MAX_EXAMPLES]}
    data = {
        "report": report,
        "histogram": {"counts": counts.tolist(), "borders": borders.tolist()},
        "looked_at": len(examples),
        "findings": [
            {
                "kind": finding.kind,
                "text": KINDS[finding.kind],
                "count": len(finding.groups),
                "groups": shown_groups[finding.kind],
            }
            for finding in findings
            if finding.groups
        ],
        "examples": [
            {
                "number": example.number,
                "row": example.row,
                "split": example.split,
                "parts": list(example.parts),
            }
            for example in examples
            if example.number in numbers
        ],
    }
    return PAGE.read_text(encoding="utf-8").replace(PLACE, without_markup(data))


def without_markup(data: Any) -> str:
    r"""JSON in which `<`, `>` and `&` are written \u003c and so on; the ASCII of anything else."""
    text = json.dumps(data)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
