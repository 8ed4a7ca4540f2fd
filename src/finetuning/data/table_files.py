"""Files of tables -> rows."""

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from finetuning.data.packed_files import open_data
from finetuning.data.row import BadRow, Row

BATCH = 1024  # rows of a table that are Python objects at a time
DELIMITERS = ",\t;|"


def parse_csv(path: Path, _: str) -> Iterator[Row]:
    with open_data(path) as stream:
        yield from csv_rows(io.TextIOWrapper(stream, "utf-8-sig", newline=""))


def csv_rows(text: TextIO) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a field of more than 131,072 characters
    number = 0
    try:
        head = text.readline()
        # strict: a quote that is never closed is an error, instead of a field to the file's end.
        lines = csv.DictReader(chain([head], text), delimiter=delimiter_of(head), strict=True)
        names = lines.fieldnames or []
        if len(set(names)) < len(names):
            raise BadRow(f"line 1: two columns have the same name: {', '.join(names)}")
        for row in lines:
            number = lines.line_num
            if None in row or None in row.values():
                raise BadRow(f"line {number}: not as many columns as the header")
            yield row
    except csv.Error as error:
        raise BadRow(f"line {lines.reader.line_num}: {error}") from None
    except UnicodeDecodeError:  # its place is counted from what was read last
        raise BadRow(f"line {number + 1} or below: is not UTF-8 text") from None


def delimiter_of(head: str) -> str:
    """What most often stands between the names of the columns; a comma if nothing does."""
    outside_quotes = re.sub(r'"[^"]*"', "", head)
    return max(DELIMITERS, key=outside_quotes.count)


def parse_parquet(path: Path, _: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with open_data(path) as stream:
        try:
            for batch in pyarrow.parquet.ParquetFile(in_any_order(stream)).iter_batches(BATCH):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise BadRow(f"is not parquet: {error}") from None


def parse_arrow(path: Path, _: str) -> Iterator[Row]:
    """Arrow's stream, which `save_to_disk` writes, or its file."""
    import pyarrow

    with open_data(path) as stream:
        content = in_any_order(stream)
        try:
            for batch in arrow_batches(content):
                for start in range(0, batch.num_rows, BATCH):
                    yield from batch.slice(start, BATCH).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise BadRow(f"is not Arrow: {error}") from None


def arrow_batches(content: Any) -> Iterator[Any]:
    import pyarrow

    is_file = content.read(6) == b"ARROW1"
    content.seek(0)
    if not is_file:
        yield from pyarrow.ipc.open_stream(content)
        return
    table = pyarrow.ipc.open_file(content)
    for number in range(table.num_record_batches):
        yield table.get_batch(number)


def in_any_order(stream: BinaryIO) -> Any:
    """The content, of which a table reads any part; that of a packed file is in memory."""
    import pyarrow

    return stream if stream.seekable() else pyarrow.BufferReader(stream.read())
