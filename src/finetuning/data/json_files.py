"""JSON files of any size -> rows: JSON Lines, an array, or an object with rows in it."""

import codecs
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from finetuning.data.json_text import CHUNK, JsonText
from finetuning.data.packed_files import open_data
from finetuning.data.row import BadRow, Row, checked_row
from finetuning.data.split_names import is_split_name

# Under which an object has its rows, where a file is one object.
ROWS_KEYS = ("data", "train", "rows", "examples", "instances")
FIRST_LINE = 2**24  # bytes of a line that is looked at as a whole
WHOLE = 2**28  # bytes of an object that can only be read as a whole


class Member(NamedTuple):
    """What an object has under one of its keys."""

    place: int
    """among the members of the object, from 0: a key that comes twice is its last"""
    length: int | None
    """elements of a list; None of another value"""
    objects: int = 0
    """elements that are objects"""

    @property
    def is_rows(self) -> bool:
        return bool(self.length) and self.objects == self.length


Members = dict[str, Member]


def parse_json(path: Path, split: str = "train") -> Iterator[Row]:
    """Lines of JSON objects, an array of them, or one object, whatever the file's name says.

    `split` chooses among those of `{"train": [...], "test": [...]}`.
    """
    if is_array(path):
        yield from array_rows(path)
        return
    members = members_of(path)
    if members is None:
        with open_data(path) as stream:
            yield from parse_jsonl(stream)
    else:
        yield from object_rows(path, members, split)


def is_array(path: Path) -> bool:
    with open_data(path) as stream:
        return JsonText(stream).peek() == "["


def array_rows(path: Path) -> Iterator[Row]:
    with open_data(path) as stream:
        text = JsonText(stream)
        for number, row in enumerate(text.elements()):
            yield checked_row(row, f"row {number}")
        text.end()


def members_of(path: Path) -> Members | None:
    """What the one object of a file has under its keys; None of a file of lines."""
    if is_of_lines(path):
        return None
    with open_data(path) as stream:
        text = JsonText(stream)
        try:
            members = {key: member_of(text, place) for place, key in enumerate(text.keys())}
            text.end()
        except json.JSONDecodeError:  # which is told where the file's lines are read
            return None
    return members


def is_of_lines(path: Path) -> bool:
    """Whether the first line is a whole value, and more text comes below."""
    with open_data(path) as stream:
        line = next(
            (line for line in iter(partial(stream.readline, FIRST_LINE), b"") if line.strip()), b""
        )
        chunks = iter(partial(stream.read, CHUNK), b"")
        return is_json(line) and any(chunk.strip() for chunk in chunks)


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def member_of(text: JsonText, place: int) -> Member:
    """The next value, of which only this is kept."""
    if text.peek() != "[":
        text.value()
        return Member(place, None)
    length = objects = 0
    for element in text.elements():
        length += 1
        objects += isinstance(element, dict)
    return Member(place, length, objects)


def object_rows(path: Path, members: Members, split: str) -> Iterator[Row]:
    """The rows of {"data": [...]}, of columns of lists, of a split; one object is one row."""
    if splits := splits_in(members):
        if split not in splits:
            raise BadRow(f"no split {split!r}; found {', '.join(splits)}")
        yield from rows_at(path, members[split].place)
        return
    for key in ROWS_KEYS:
        if key in members and members[key].is_rows:
            yield from rows_at(path, members[key].place)
            return
    with open_data(path) as stream:
        content = stream.read(WHOLE + 1)
    if len(content) > WHOLE:
        raise BadRow(
            f"is one object of more than {WHOLE // 2**20} MiB, and its rows are not in one list; "
            "write it as .jsonl, .csv or .parquet"
        )
    row = json.loads(content.removeprefix(codecs.BOM_UTF8))
    yield from column_rows(row) if is_columns(members) else [row]


def rows_at(path: Path, wanted: int) -> Iterator[Row]:
    """The elements of the list that is this member of the file's object."""
    with open_data(path) as stream:
        text = JsonText(stream)
        for place, _ in enumerate(text.keys()):
            if place == wanted:
                yield from text.elements()
                return
            member_of(text, place)


def splits_in(members: Members) -> list[str]:
    """The names of the splits of an object of nothing else, of two or more; [] of another one."""
    has_splits = len(members) > 1 and all(
        is_split_name(key) and member.is_rows for key, member in members.items()
    )
    return [*members] if has_splits else []


def is_columns(members: Members) -> bool:
    """Whether the values are columns: lists of one length. A row's own lists are of its turns."""
    lengths = {member.length for member in members.values()}
    has_turns = any(member.objects for member in members.values())
    return len(members) > 1 and len(lengths) == 1 and None not in lengths and not has_turns


def column_rows(columns: Row) -> Iterator[Row]:
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def parse_jsonl(lines: Iterable[bytes]) -> Iterator[Row]:
    before = 0  # bytes of the lines above
    for number, line in enumerate(lines, start=1):
        text = decoded(line, before).rstrip()  # an error at its end is on this line
        before += len(line)
        if text:
            try:
                yield checked_row(json.loads(text), f"line {number}")
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(
                    error.msg, "\n" * (number - 1) + text, number - 1 + error.pos
                ) from None


def decoded(line: bytes, before: int) -> str:
    """The line as text. An error names the byte in the file, `before` of which are above it."""
    try:
        return line.decode("utf-8" if before else "utf-8-sig")
    except UnicodeDecodeError as error:
        places = before + error.start, before + error.end
        raise UnicodeDecodeError("utf-8", line, *places, error.reason) from None
