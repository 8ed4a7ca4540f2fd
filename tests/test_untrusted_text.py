"""Texts of others: nothing in them acts on a terminal, or is markup in a document of ours."""

import io

import pytest
from rich.table import Table

from finetuning.runs.terminal import make_console
from finetuning.script import safe
from finetuning.untrusted_text import cell, code_cell, inline, printable

ACTING = {
    "ESC": "\x1b[31mred\x1b]52;c;eA==\x07",
    "C1": "\x9b31m\x9d0;title\x9c",
    "bidi": "a\u202eb\u2066c",
    "CR": "shown\rhidden",
    "surrogate": "\udc80",
    "separator": "a\u2028b",
    "tag": "a\U000e0041",
}


@pytest.mark.parametrize("kind", ACTING)
def test_what_would_act_on_a_terminal_is_shown_as_its_escape(kind):
    text = printable(ACTING[kind])
    assert text.isprintable() and "\\" in text
    assert printable(text) == text


def test_what_is_only_text_stays():
    text = "日本語\tand\nemoji 👩‍👩‍👧 ünï"
    assert printable(text) == text


@pytest.mark.parametrize("kind", ACTING)
def test_the_console_prints_nothing_that_acts(kind):
    console = make_console()
    console.file = io.StringIO()
    table = Table("a")
    table.add_row(ACTING[kind])
    console.print(ACTING[kind], table)
    assert console.file.getvalue().replace("\n", "").isprintable()


MARKUP = {
    "heading": "mit\n\n## Notice",
    "image": "![x](https://a.example/x.png)",
    "link": "[log in](https://a.example)",
    "autolink": "<https://a.example>",
    "bare link": "https://a.example",
    "www": "www.a.example",
    "mail": "a@b.example",
    "html": "<img src=x onerror=y>",
    "comment": "<!-- end of checkpoints -->",
    "fence": "x\n```sh\ncurl a | sh\n```",
    "cell": "a | b",
    "entity": "&lt;b&gt;",
    "emphasis": "*a* _b_ ~~c~~",
    "maths": "$x$",
}


@pytest.mark.parametrize("kind", MARKUP)
@pytest.mark.parametrize("form", [cell, inline])
def test_nothing_is_markup_in_a_cell(kind, form):
    """As GitHub renders it: one paragraph of text that reads as it was written."""
    html = rendered(form(MARKUP[kind]))
    assert html.startswith("<p>") and html.count("<") == 2
    assert "\n" not in form(MARKUP[kind])


def rendered(text: str) -> str:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("gfm-like", {"linkify": False})
    return parser.render(text).strip()


def test_code_cannot_end_its_code_or_its_cell():
    assert code_cell("a`b|c\nd") == "`a'b\\|c d`"


def test_a_name_reads_as_it_is():
    assert cell("elith/tiny_base-1.0") == "elith/tiny_base-1.0"
    assert len(cell("x" * 500)) == 80


def test_what_a_script_says_in_the_end_holds_no_secret(monkeypatch):
    monkeypatch.setenv("SOME_VENDOR_TOKEN", "correct-horse-battery")
    line = safe(f"override 'training.hub_token=hf_{'a' * 34}' correct-horse-battery \x1b[0m")
    assert line == (
        "override 'training.hub_token=[Hugging Face token]' [value of SOME_VENDOR_TOKEN] \\x1b[0m"
    )
