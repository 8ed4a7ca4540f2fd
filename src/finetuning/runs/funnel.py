"""The funnel of rows: how many were loaded, kept and lost, and why."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from finetuning.runs.doctor import KINDS, Finding
from finetuning.runs.terminal import GREY

BIASED = 0.6  # share of pairs, from which their lengths alone tell much of what was preferred


def print_funnel(console: Console, report: dict[str, Any]) -> None:
    """How many rows were loaded, kept and lost, and why."""
    print_rows(console, report)
    print_lost(console, report)
    print_tokens(console, report["tokens"])
    if pairs := report.get("pairs"):
        print_lengths(console, pairs)
    for line in remarks(report):
        console.print(line)


def print_rows(console: Console, report: dict[str, Any]) -> None:
    rows = report["rows"]
    console.print(
        f"rows     {rows['loaded']:,} loaded -> {rows['where']:,} selected -> "
        f"{rows['kept']:,} kept -> {rows['train']:,} train, {rows['eval']:,} eval",
    )
    if conversations := report.get("conversations"):
        console.print(
            f"turns    {conversations:,} conversations -> {report['examples']:,} examples: "
            "one for each response"
        )
    if unused := report.get("unused"):
        console.print(f"unused   columns {', '.join(unused)}")
    if empty := report.get("empty"):
        console.print(f"{empty:,} rows have an empty response, which trains a bare end mark")


def print_lost(console: Console, report: dict[str, Any]) -> None:
    """Rows that were dropped or cut, by reason, and where they stand."""
    lost = dict(report["dropped"])
    if report["cut"]:
        lost["cut"] = report["cut"]
    if not lost:
        return
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in lost.items())
    console.print(f"lost     {reasons}")
    for place in report["places"]:
        console.print(f"         {place}", style=GREY)


def print_tokens(console: Console, tokens: dict[str, int]) -> None:
    share = tokens["response"] / max(1, tokens["total"])
    console.print(
        f"tokens   {tokens['total']:,}: {tokens['prompt']:,} prompt, "
        f"{tokens['response']:,} response ({share:.1%}); longest example {tokens['max']:,}",
    )


def remarks(report: dict[str, Any]) -> Iterator[str]:
    """What else is to be known of the rows."""
    yield f"end mark trained in {report['end_mark_share']:.1%} of the kept rows"
    if mark := report["added_end_mark"]:
        yield f"the chat template ends no last response: {mark} is added, and saved in it"
    if report["duplicates"] and "duplicate" not in report["dropped"]:
        yield (
            f"{report['duplicates']:,} examples are copies of earlier ones "
            "(data.duplicates: drop leaves them out)"
        )
    if report["leaked"]:
        yield (
            f"{report['leaked']:,} evaluation examples share a prompt or long response with "
            "training:\n         data.eval.group_by: same_text keeps them apart"
        )
    if report["spelled"]:
        yield f"{report['spelled']:,} rows spell a special token: it stays text there"
    if report["merged"]:
        yield (
            f"{report['merged']:,} rows have a token that would cross the end of a prompt: "
            "the prompt's tokens are kept"
        )


def print_lengths(console: Console, pairs: dict[str, float]) -> None:
    """Of chosen and rejected responses, and whether the length alone tells them apart."""
    longer, shorter = pairs["chosen_longer"], pairs["chosen_shorter"]
    console.print(
        f"pairs    chosen responses have {pairs['chosen']:.1f} tokens, rejected ones "
        f"{pairs['rejected']:.1f} (means); the chosen one is longer in {longer:.0%}, shorter in "
        f"{shorter:.0%}"
    )
    if max(longer, shorter) > BIASED:
        which = "longer" if longer > shorter else "shorter"
        console.print(f"         a length bias: {which} answers are preferred, and will be learnt")


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """What is wrong with the data, and how often."""
    for finding in findings:
        if finding.groups:
            console.print(f"found    {len(finding.groups):,} times {KINDS[finding.kind]}")
