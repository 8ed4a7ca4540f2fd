"""Generated tables are what the code says now, and messages of tables are messages of the code."""

import ast
import re

import pytest
import tables
from commands import ROOT
from pages import code_in, sections, table


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_code(page):
    assert page.read_text(encoding="utf-8") == tables.updated(page), "run `make tables`"


def test_every_table_stands_in_a_page_of_either_language():
    placed = {False: set(), True: set()}
    for page in tables.pages():
        names = {match[2] for match in tables.PLACE.finditer(page.read_text(encoding="utf-8"))}
        placed[page.name.endswith(".ja.md")] |= names
    assert placed[False] == placed[True] == tables.TABLES.keys()


def test_the_rooms_are_the_packages():
    found = {f"`{path.parent.name}/`" for path in tables.PACKAGE.glob("*/__init__.py")}
    (_, *rows) = tables.rooms()
    assert {row[0] for row in rows} == found
    for name, _, first in rows:
        assert (tables.PACKAGE / name.strip("`") / first.strip("`")).is_file()


@pytest.mark.parametrize("make", [tables.scripts, tables.rooms, tables.incompatible])
def test_what_only_we_write_is_translated(make):
    assert tables.untranslated(make()) == []


def test_a_reader_of_a_user_s_own_stays_english_and_is_named():
    rows = [["`faq`", "{title, body} of our FAQ"]]
    assert tables.in_japanese(rows) == rows
    assert tables.untranslated(rows) == ["{title, body} of our FAQ"]


def test_no_translation_is_left_over():
    cells = {cell for make in tables.TABLES.values() for row in make() for cell in row}
    assert tables.YAML(typ="safe").load(tables.JAPANESE).keys() <= cells


def test_the_folders_of_the_architecture_are_all_there_are():
    listed = {code_in(row[0])[0] for row in table("docs/architecture.md", "Other folders")}
    found = {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith((".", "src")) and is_ours(path.name)
    }
    assert listed == found


def is_ours(name: str) -> bool:
    """Whether .gitignore does not name the folder."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return name not in {line.strip("/") for line in ignored}


# Troubleshooting


def texts_of_the_code() -> list[str]:
    """Every text in src/, with a NUL in the place of what is filled in."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                found.append("".join(part if isinstance(part, str) else "\0" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts_of_the_code()
MESSAGES = [
    message
    for one in sections("docs/troubleshooting.md")
    for rows in one.tables
    if rows[0][0] == "message"
    for row in rows[1:]
    for message in code_in(row[0])
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_troubleshooting_is_one_of_the_code(message):
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert any(re.search(pattern, text, re.DOTALL) for text in TEXTS)
