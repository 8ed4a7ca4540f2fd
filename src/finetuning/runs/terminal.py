"""The console of all scripts; the answers before and after training, and what is published."""

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from finetuning.runs.samples import Sample
from finetuning.untrusted_text import printable

GREY = "bright_black"  # of what matters less


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
        table.add_row(what, path, f"{size:,} bytes", style=GREY if what == "same" else None)
    console.print(table, soft_wrap=False)
    sent = sum(size for _, what, size in changes if what in ("new", "changed"))
    is_same = all(what == "same" for _, what, _ in changes)
    console.print("nothing would change" if is_same else f"to send: {sent:,} bytes")
    console.print(f"stays here: {', '.join(unpublished)}" if unpublished else "")
