"""Writes the tables that come from code into the pages, in both languages: `make tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, NAME being a function of TABLES.
In a Japanese page its cells are translated by tables.ja.yaml; a text that is not in there stays
English and is named.
"""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from finetuning.data.markers import Markers
from finetuning.data.preferences import PREFERENCE_READERS
from finetuning.data.readers import READERS
from finetuning.data.row import Message
from finetuning.data.templates import CHAT, TEMPLATES, MarkerTemplate
from finetuning.launch.compatibility import RULES
from finetuning.model.families import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "finetuning"
JAPANESE = ROOT / "docs" / "tables.ja.yaml"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Rows = list[list[str]]


def rooms() -> Rows:
    """The package's folders in the order of imports, with the first paragraph of their
    docstrings."""
    order = re.findall(r"\w+", docstring(PACKAGE / "__init__.py").partition("holds it):")[2])
    names = [name for name in order if (PACKAGE / name / "__init__.py").is_file()]
    rows = []
    for name in names:
        text = docstring(PACKAGE / name / "__init__.py")
        (first,) = re.findall(r"Read `(\w+\.py)` first", text)
        rows.append([f"`{name}/`", summary(text), f"`{first}`"])
    return [["package", "what it does", "read first"], *rows]


def scripts() -> Rows:
    """The scripts, each with the first line of its manual."""
    files = sorted((ROOT / "src").glob("*.py"))
    rows = [[f"`{file.name}`", summary(docstring(file))] for file in files]
    return [["script", "what it does"], *rows]


def readers() -> Rows:
    """The readers, each with the first paragraph of its docstring: the columns it takes."""
    rows = [[f"`{name}`", summary(read.__doc__ or "")] for name, read in READERS.items()]
    return [["`data.reader`", "columns of a row"], *rows]


def preference_readers() -> Rows:
    """The readers of pairs, in the same way."""
    rows = [[f"`{name}`", summary(read.__doc__ or "")] for name, read in PREFERENCE_READERS.items()]
    return [["`data.reader`", "columns of a row"], *rows]


def templates() -> Rows:
    """The templates, each as it writes one question and its answer."""
    rows = [
        [f"`{name}`", *texts(markers), f"`{' '.join(places(markers))}`"]
        for name, markers in TEMPLATES.items()
    ]
    chat = [f"`{CHAT}`", "the tokenizer's own chat template", "", "those of the chat template"]
    return [["`data.template`", "prompt", "response", "roles it has a place for"], *rows, chat]


def texts(markers: Markers) -> list[str]:
    """Prompt and response, quoted."""
    messages: list[Message] = [
        {"role": "user", "content": "{user}"},
        {"role": "assistant", "content": "{assistant}"},
    ]
    segments = MarkerTemplate(markers, eos="<eos>").render(messages)
    sides = ["".join(s.text for s in segments if s.is_response == side) for side in (False, True)]
    return [f'`"{side}"`'.replace("\n", r"\n") for side in sides]


def places(markers: Markers) -> list[str]:
    return [role for role in ("system", "user", "context", "tool") if getattr(markers, role)]


def incompatible() -> Rows:
    """What does not go together, from the rules that refuse it."""
    rows = [[f"`{rule.what}`", rule.why, rule.instead] for rule in RULES]
    return [["does not work", "because", "instead"], *rows]


def families() -> Rows:
    """The families of models whose training is tested."""
    rows = [[f"`{kind}`", family.names, family.note] for kind, family in FAMILIES.items()]
    return [["`model_type`", "models", "particular"], *rows]


TABLES: dict[str, Callable[[], Rows]] = {
    table.__name__: table
    for table in (
        scripts,
        rooms,
        readers,
        preference_readers,
        templates,
        incompatible,
        families,
    )
}


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def summary(docstring: str) -> str:
    """The first paragraph, without its full stop."""
    return " ".join(docstring.partition("\n\n")[0].split()).removesuffix(".")


def in_japanese(rows: Rows) -> Rows:
    """The rows with their cells in Japanese, where there is a translation; code stays."""
    translations = YAML(typ="safe").load(JAPANESE)
    return [[translations.get(cell, cell) for cell in row] for row in rows]


def untranslated(rows: Rows) -> list[str]:
    """Cells that stay English in a Japanese page and are not code."""
    left = [
        cell
        for row, twin in zip(rows, in_japanese(rows), strict=True)
        for cell, other in zip(row, twin, strict=True)
        if cell == other
    ]
    names = [family.names for family in FAMILIES.values()]
    same = re.compile(r"(`[^`]*`)?|\{.*\}|accelerate_configs/\S+")
    return [cell for cell in left if not same.fullmatch(cell) and cell not in names]


def markdown(rows: Rows) -> str:
    head, *body = [f"| {' | '.join(row)} |\n" for row in rows]
    return f"{head}|{'---|' * len(rows[0])}\n{''.join(body)}".replace("|  |", "| |")


def updated(page: Path) -> str:
    """The page's text with its tables as the code has them now."""

    def table(place: re.Match) -> str:
        rows = TABLES[place[2]]()
        if page.name.endswith(".ja.md"):
            rows = in_japanese(rows)
        return place[1] + markdown(rows) + place[3]

    return PLACE.sub(table, page.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


if __name__ == "__main__":
    for page in pages():
        page.write_text(updated(page), encoding="utf-8")
    for cell in [cell for table in TABLES.values() for cell in untranslated(table())]:
        print(f"{JAPANESE.relative_to(ROOT)} has no translation of: {cell}", file=sys.stderr)
