"""Every row that `data.where` keeps, in blocks."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from finetuning.data.row import Row
from finetuning.data.section import Data, Source
from finetuning.data.sources import stream_rows
from finetuning.data.tally import Tally
from finetuning.errors import UserError, did_you_mean

BLOCK_ROWS, BLOCK_TEXT = 2048, 2**22  # rows and characters that are worked on at once, about


class LoadedRow(NamedTuple):
    """A row that `where` keeps."""

    number: int
    """in order of loading, from 0"""
    source: int
    is_eval: bool
    """of the split that data.eval.split names"""
    place: str
    columns: Row


def blocks_of_rows(data: Data, tally: Tally) -> Iterator[list[LoadedRow]]:
    """Every row that `where` keeps, in order of loading, some at a time."""
    block: list[LoadedRow] = []
    text = 0
    rows = load_rows(data, tally)
    for row in tqdm(rows, desc="preparing", unit=" rows", disable=None, leave=False, delay=1):
        block.append(row)
        text += text_in(row.columns)
        if len(block) == BLOCK_ROWS or text > BLOCK_TEXT:
            yield block
            block, text = [], 0
    if block:
        yield block


def text_in(value: Any) -> int:
    """Characters in a value of a row, about."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(text_in, value.values()))
    return sum(map(text_in, value)) if isinstance(value, list) else 0


def load_rows(data: Data, tally: Tally) -> Iterator[LoadedRow]:
    """Every row that `where` keeps. Rows are numbered in order of loading."""
    for number, source in enumerate(data.sources):
        yield from load_split(source, number, False, tally)
        if data.eval and data.eval.split:
            other = source.model_copy(update={"split": data.eval.split})
            yield from load_split(other, number, True, tally)


def load_split(source: Source, number: int, is_eval: bool, tally: Tally) -> Iterator[LoadedRow]:
    unseen, first = set(source.where), ("", Row())
    for name, rows in stream_rows(source):
        for index, row in enumerate(rows):
            first = first if first[0] else (name, row)
            unseen -= row.keys()
            tally.counts["loaded"] += 1
            if matches(row, source.where):
                tally.counts["where"] += 1
                place = f"{name}: row {index}"
                yield LoadedRow(tally.counts["loaded"] - 1, number, is_eval, place, row)
    for column in source.where:
        if column in unseen:
            raise no_such_column(column, *first)


def matches(row: Row, where: dict[str, Any]) -> bool:
    return all(row.get(column) == value for column, value in where.items())


def no_such_column(column: str, name: str, row: Row) -> UserError:
    found = f"it has {', '.join(row)}{did_you_mean(column, row)}"
    return UserError(f"data.where: {name} has no column {column}, {found}")
