"""What a person sees: the funnel of rows, coloured masks, answers before and after, the budget."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from finetuning.data.tokenization import IGNORE_INDEX, Example, Examples, sequences_of
from finetuning.runs.doctor import KINDS, Finding
from finetuning.runs.samples import Sample
from finetuning.untrusted_text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finetuning.budget.budget import Budget


# Colours of tokens that are not trained, that are, and that are of a rejected response.
PROMPT, RESPONSE, REJECTED = "bright_black", "bold green", "bold red"
BIASED = 0.6  # share of pairs, from which their lengths alone tell much of what was preferred


class PrintableConsole(Console):
    """A console that prints no control characters but its own: rows and names are others'.

    An escape in a row could colour an untrained text green, which only trained tokens are.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


def make_console(quiet: bool = False) -> Console:
    """One that prints text as it is: no markup, no colours for numbers, no line breaks of its own.

    A table is printed with soft_wrap=False: its cells are wrapped.
    """
    return PrintableConsole(quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_funnel(console: Console, report: dict[str, Any]) -> None:
    """How many rows were loaded, kept and lost, and why."""
    rows, tokens = report["rows"], report["tokens"]
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
    lost = {**report["dropped"], **({"cut": report["cut"]} if report["cut"] else {})}
    if lost:
        console.print(
            "lost     " + ", ".join(f"{number:,} {reason}" for reason, number in lost.items())
        )
        for place in report["places"]:
            console.print(f"         {place}", style=PROMPT)
    share = tokens["response"] / max(1, tokens["total"])
    console.print(
        f"tokens   {tokens['total']:,}: {tokens['prompt']:,} prompt, "
        f"{tokens['response']:,} response ({share:.1%}); longest example {tokens['max']:,}",
    )
    if pairs := report.get("pairs"):
        print_lengths(console, pairs)
    console.print(f"end mark trained in {report['end_mark_share']:.1%} of the kept rows")
    if mark := report["added_end_mark"]:
        console.print(f"the chat template ends no last response: {mark} is added, and saved in it")
    if report["duplicates"] and "duplicate" not in report["dropped"]:
        console.print(
            f"{report['duplicates']:,} examples are copies of earlier ones "
            "(data.duplicates: drop leaves them out)"
        )
    if report["leaked"]:
        console.print(
            f"{report['leaked']:,} evaluation examples share a prompt or long response with "
            "training:\n         data.eval.group_by: same_text keeps them apart"
        )
    if report["spelled"]:
        console.print(f"{report['spelled']:,} rows spell a special token: it stays text there")
    if report["merged"]:
        console.print(
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


def print_example(console: Console, example: Example, tokenizer: "PreTrainedTokenizerFast") -> None:
    """The text of one example, prompt grey and response green."""
    console.print(coloured(example, tokenizer))
    console.rule(style=PROMPT)


def coloured(example: Example, tokenizer: "PreTrainedTokenizerFast") -> Text:
    """Of a pair the prompt, the chosen response and, on a line of its own, the rejected one."""
    text = Text()
    for part, colour in zip(sequences_of(example), (RESPONSE, REJECTED), strict=False):
        words_of_part = trained_and_not(part, tokenizer)
        if text:
            text.append("\n")
            del words_of_part[0]  # the same prompt
        for words, is_trained in words_of_part:
            text.append(words, style=colour if is_trained else PROMPT)
    return text


def trained_and_not(
    example: Example, tokenizer: "PreTrainedTokenizerFast"
) -> list[tuple[str, bool]]:
    """The example's text in parts, and whether the tokens of each are trained.

    Neighbouring tokens are decoded together, so that characters of several tokens (Japanese, emoji)
    stay whole.
    """
    is_trained = example["labels"] != IGNORE_INDEX
    borders = np.flatnonzero(np.diff(is_trained)) + 1
    parts, shown = [], ""
    for end in [*borders.tolist(), len(is_trained)]:
        whole = str(tokenizer.decode(example["input_ids"][:end].tolist()))
        parts.append((whole[len(shown) :], bool(is_trained[end - 1])))
        shown = whole
    return parts


def print_answers(console: Console, samples: list[Sample]) -> None:
    """Question, answer before and after training, side by side."""
    if not samples:
        return
    table = Table("question", "before", "after", show_lines=True)
    for sample in samples:
        table.add_row(sample.question, sample.before or "(not asked)", sample.after)
    console.print(table, soft_wrap=False)


def print_changes(
    console: Console, changes: Sequence[tuple[str, str, int]], unpublished: list[str]
) -> None:
    """What a publication would change, (path, what, bytes), and what stays in the run folder."""
    table = Table("", "path", "size")
    table.columns[2].justify = "right"
    for path, what, size in changes:
        table.add_row(what, path, f"{size:,} bytes", style=PROMPT if what == "same" else None)
    console.print(table, soft_wrap=False)
    sent = sum(size for _, what, size in changes if what in ("new", "changed"))
    console.print(
        f"to send: {sent:,} bytes"
        if any(what != "same" for _, what, _ in changes)
        else "nothing would change"
    )
    console.print(f"stays here: {', '.join(unpublished)}" if unpublished else "")


EXPLAINED = {
    "weights": "of the base model",
    "adapters": "LoRA",
    "gradients": "of what is trained",
    "optimizer": "its averages",
    "activations": "kept for backward, or needed meanwhile",
    "logits": "of some response positions at a time",
    "communication": "between processes",
}


VERDICTS = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red"}


def budget_table(budget: "Budget") -> Table:
    table = Table("memory of a process", "MiB", "")
    table.columns[1].justify = "right"
    for part, size in budget.parts.items():
        if size:
            table.add_row(part, mib(size), EXPLAINED[part])
    table.add_section()
    table.add_row("total", mib(budget.total), f"of {mib(budget.available)} on {budget.device.name}")
    return table


def print_budget(console: Console, budget: "Budget", advice: list[str]) -> None:
    """Memory of a process part by part, steps, time, disk, and whether it fits."""
    console.print(budget_table(budget), soft_wrap=False)
    examples, slots, responses = budget.longest
    lines = {
        "longest": f"{examples} examples, {slots:,} tokens computed, "
        f"{responses:,} of them response",
        "steps": f"{budget.steps:,} of {budget.step} examples ({budget.strategy}), "
        f"{budget.tokens:,} tokens in all",
        "time": computing(budget),
        "disk": f"{mib(budget.disk)} MiB for checkpoints and weights, {mib(budget.free)} are free",
    }
    for name, text in lines.items():
        console.print(f"{name:<8} {text}")
    console.print(f"verdict  {budget.verdict}", style=VERDICTS[budget.verdict])
    if budget.verdict != "fits":
        console.print(f"         by this estimate enough: {', or '.join(advice)}")
    if budget.disk > budget.free:
        console.print(
            "         too little room on the disk: lower training.save_total_limit, or make room",
            style="red",
        )


def computing(budget: "Budget") -> str:
    if budget.seconds is None:
        return "not known for this GPU"
    shortest, longest = map(duration, budget.seconds)
    return f"{shortest} to {longest} of computing, without start, evaluation and answers"


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size < 10 * 2**20 else f"{size / 2**20:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def examples_in_order(train: Examples, held: Examples | None) -> Iterator[tuple[str, int, Example]]:
    """(split, row, example) of every example, in the order of the rows."""
    parts = [
        zip(repeat(name), part.rows.tolist(), part, strict=False)
        for name, part in (("train", train), ("eval", held))
        if part is not None
    ]
    return heapq.merge(*parts, key=lambda item: item[1])


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """What is wrong with the data, and how often."""
    for finding in findings:
        if finding.groups:
            console.print(f"found    {len(finding.groups):,} times {KINDS[finding.kind]}")
