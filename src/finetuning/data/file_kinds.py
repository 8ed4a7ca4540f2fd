"""Files -> rows, by the kind of file. A new kind is one function, named in PARSERS."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from finetuning.data.row import BadRow, Row
from finetuning.errors import UserError

# Files that `datasets` writes beside the data.
METADATA_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
MAX_RATIO = 100  # of a packed file; texts compress by 3 to 20
BATCH = 1024  # rows of a table that are Python objects at a time
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
DELIMITERS = ",\t;|"
# A split's name as a word of a path in lower case: `validation`, but not `latest` or `devices`.
SPLIT_NAME = re.compile(
    r"(?<![a-z])(?:(?:train|test|dev|val)(?:ing|set)?|valid[a-z]*|eval[a-z]*)(?![a-z])"
)
# Under which an object has its rows, where a file is one object.
ROWS_KEYS = ("data", "train", "rows", "examples", "instances")


def open_zstandard(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


PACKINGS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".zst": open_zstandard,
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}


def suffix_of(path: Path) -> str:
    """The kind of file, in lower case, without that of its packing."""
    is_packed = path.suffix.lower() in PACKINGS
    return (path.with_suffix("") if is_packed else path).suffix.lower()


def open_data(path: Path) -> io.BufferedReader:
    """The file's content, unpacked as it is read."""
    is_packed = path.suffix.lower() in PACKINGS
    return io.BufferedReader(Unpacked(path) if is_packed else io.FileIO(path))


class Unpacked(io.RawIOBase):
    """What a file unpacks to. Raises UserError where that is more than rows compress by."""

    def __init__(self, path: Path) -> None:
        self.path, self.stream = path, PACKINGS[path.suffix.lower()](path)
        self.left = MAX_RATIO * path.stat().st_size + 2**20

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.stream.readinto(buffer)
        self.left -= count
        if self.left < 0:
            found = f"unpacks to more than {MAX_RATIO} times its size"
            raise UserError(f"{self.path}: {found}; unpack it first")
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def parse_json(stream: BinaryIO, split: str = "train") -> Iterator[Row]:
    """Lines of JSON objects, an array of them, or one object, whatever the file's name says.

    `split` chooses among those of `{"train": [...], "test": [...]}`.
    """
    head = b"".join(lines_until_text(stream))
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] == b"[" or (start[:1] == b"{" and not is_json(start)):
        yield from parse_document(head + stream.read(), split)
        return
    below = lines_until_text(stream)
    if start and not (below and below[-1].strip()):
        yield from rows_of_document(json.loads(start), split)
    else:
        yield from parse_jsonl(chain(io.BytesIO(head), below, stream))


def lines_until_text(stream: BinaryIO) -> list[bytes]:
    """The next lines, through the first that is not blank."""
    lines = []
    for line in stream:
        lines.append(line)
        if line.removeprefix(codecs.BOM_UTF8).strip():
            break
    return lines


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def parse_document(content: bytes, split: str) -> Iterator[Row]:
    """The rows of a file that is one JSON value, or objects one below another."""
    try:
        document = json.loads(content.removeprefix(codecs.BOM_UTF8))
    except json.JSONDecodeError:
        if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            raise
        yield from parse_jsonl(io.BytesIO(content))
        return
    yield from rows_of_document(document, split)


def rows_of_document(document: Any, split: str) -> Iterator[Row]:
    """The rows of an array, of {"data": [...]}, of columns of lists, of a split; one object is one
    row.
    """
    if isinstance(document, list):
        for number, row in enumerate(document):
            yield checked_row(row, f"row {number}")
        return
    if splits := splits_of(document):
        if split not in splits:
            raise BadRow(f"no split {split!r}; found {', '.join(splits)}")
        yield from splits[split]
        return
    row = checked_row(document, "row 0")
    for key in ROWS_KEYS:
        if is_rows(row.get(key)):
            yield from row[key]
            return
    if is_columns(row):
        for values in zip(*row.values(), strict=True):
            yield dict(zip(row, values, strict=True))
    else:
        yield row


def splits_of(document: Any) -> dict[str, list[Row]]:
    """{split: rows} of an object of nothing else, of two splits or more; {} of another one."""
    is_object = isinstance(document, dict) and len(document) > 1
    named = is_object and all(SPLIT_NAME.fullmatch(str(key).lower()) for key in document)
    return document if named and all(map(is_rows, document.values())) else {}


def is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value) and bool(value)


def is_columns(row: Row) -> bool:
    """Whether the values are columns: lists of one length. A row's own lists are of its turns."""
    columns = list(row.values())
    if len(columns) < 2 or not all(isinstance(column, list) for column in columns):
        return False
    has_turns = any(isinstance(value, dict) for column in columns for value in column)
    return len({len(column) for column in columns}) == 1 and not has_turns


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


def parse_csv(stream: BinaryIO) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a field of more than 131,072 characters
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
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


def parse_parquet(stream: BinaryIO) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Its parts are read in any order, which a packed stream cannot do.
        content = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
        for batch in pyarrow.parquet.ParquetFile(content).iter_batches(BATCH):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadRow(f"is not parquet: {error}") from None


def parse_arrow(stream: BinaryIO) -> Iterator[Row]:
    """Arrow's stream, which `save_to_disk` writes, or its file."""
    import pyarrow

    content = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
    is_file = content.read(6) == b"ARROW1"
    content.seek(0)
    try:
        if is_file:
            table = pyarrow.ipc.open_file(content)
            batches = (table.get_batch(n) for n in range(table.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(content))
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.slice(start, BATCH).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadRow(f"is not Arrow: {error}") from None


def checked_row(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise BadRow(f"{place}: expected an object, found {type(row).__name__}")
    return row


PARSERS: dict[str, Callable[[BinaryIO], Iterable[Row]]] = {
    ".jsonl": parse_json,
    ".json": parse_json,
    ".csv": parse_csv,
    ".ndjson": parse_json,
    ".tsv": parse_csv,
    ".parquet": parse_parquet,
    ".arrow": parse_arrow,
}
FILE_KINDS = f"{', '.join(PARSERS)}, also with {', '.join(PACKINGS)}"
