"""The pages, read by a Markdown parser: README, CONTRIBUTING.md and docs/, in both languages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from commands import ROOT
from markdown_it import MarkdownIt
from markdown_it.token import Token

ENGLISH = [
    path.relative_to(ROOT).as_posix()
    for path in [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    if not path.name.endswith(".ja.md")
]
JAPANESE = [page.replace(".md", ".ja.md") for page in ENGLISH]
PAGES = [*ENGLISH, *JAPANESE, "CONTRIBUTING.md"]
PARSER = MarkdownIt("commonmark").enable("table")


@dataclass
class Section:
    """What stands between one heading and the next."""

    title: str = ""
    level: int = 0
    blocks: list[tuple[str, str]] = field(default_factory=list)
    """(language, text) of the code blocks"""
    tables: list[list[list[str]]] = field(default_factory=list)
    """rows of cells, the head first"""
    code: set[str] = field(default_factory=set)
    """what stands in backticks"""
    text: str = ""
    """paragraphs and lists, without code"""
    cells: str = ""
    """of its tables, without code"""


def source(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def sections(page: str) -> list[Section]:
    """The page cut at its headings; the first section is what stands before them."""
    found = [Section()]
    tokens = PARSER.parse(source(page))
    for before, token in zip([None, *tokens], tokens, strict=False):
        here = found[-1]
        if token.type == "inline" and before.type == "heading_open":
            found.append(Section(token.content, int(before.tag[1])))
        elif token.type in ("fence", "code_block"):
            here.blocks.append((token.info, token.content))
        elif token.type == "table_open":
            here.tables.append([])
        elif token.type == "tr_open":
            here.tables[-1].append([])
        elif token.type == "inline":
            here.code |= {child.content for child in token.children if child.type == "code_inline"}
            words = "".join(prose(token)) + "\n"
            if before.type in ("th_open", "td_open"):
                here.tables[-1][-1].append(token.content)
                here.cells += words
            else:
                here.text += words
    return found


def prose(token: Token) -> Iterator[str]:
    """The text of a paragraph or cell, without code."""
    for child in token.children or []:
        if child.type in ("text", "softbreak"):
            yield child.content or "\n"


def section(page: str, title: str) -> Section:
    """The section with the heading."""
    (found,) = [one for one in sections(page) if one.title == title]
    return found


def block(page: str, title: str, language: str) -> str:
    """The one code block in the language below the heading."""
    (found,) = [text for name, text in section(page, title).blocks if name == language]
    return found


def table(page: str, title: str) -> list[list[str]]:
    """The rows of the first table below the heading, without its head."""
    return section(page, title).tables[0][1:]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def shell_lines(text: str) -> list[str]:
    """The commands of a shell block, comments taken off."""
    lines = text.replace("\\\n", " ").splitlines()
    inner = [re.sub(r"^\w+=\$\((.*)\)$", r"\1", line) for line in lines]  # job=$(command)
    return [uncommented(line) for line in inner if uncommented(line)]


def uncommented(line: str) -> str:
    return re.sub(r"(^|\s+)#.*", "", line)


def commands(page: str) -> list[str]:
    """What a page tells people to type."""
    blocks = [text for one in sections(page) for name, text in one.blocks if name == "sh"]
    return [line for text in blocks for line in shell_lines(text)]


def recipe_header(name: str) -> str:
    """The comment that a file of recipes/ begins with, without its marks."""
    lines = (ROOT / "recipes" / name).read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def listed_recipes() -> list[str]:
    """The files of recipes/ that the table of recipes lists; others are a user's own."""
    rows = table("docs/recipe.md", "Recipes of this repository")
    return [re.search(r"recipes/([\w.-]+\.yaml)", row[0])[1] for row in rows]


def recipe_commands(name: str) -> list[str]:
    """The indented lines of a recipe's header."""
    lines = [line for line in recipe_header(name).splitlines() if line.startswith("  ")]
    return shell_lines("\n".join(lines))


def target_of(page: str, link: str) -> Path:
    return (ROOT / page).parent / link.partition("#")[0]
