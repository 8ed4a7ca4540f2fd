"""Source -> rows.

A source is a local json, jsonl, csv or parquet file (also .gz), a folder of them, or a data set of
the Hub. Local files are read here and not by `datasets`: an unreadable line is named by its number,
rows of uneven columns are no error, and nothing heavy is imported.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from finetuning.data.readers import FILE_READERS
from finetuning.data.row import BadRow, Row
from finetuning.data.section import Source
from finetuning.errors import UserError, one_line

# A split's name as a word of a path in lower case: `validation`, but not `latest` or `devices`.
SPLIT_NAME = re.compile(
    r"(?<![a-z])(?:(?:train|test|dev|val)(?:ing|set)?|valid[a-z]*|eval[a-z]*)(?![a-z])"
)
# Files that `datasets` writes beside the data.
METADATA_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}

MAX_RATIO = 100  # of a .gz; texts compress by 3 to 20
BATCH = 1024  # rows of a table that are Python objects at a time
UNREADABLE = (OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Rows:
    """Rows as loaded, and what messages call them."""

    rows: list[Row]
    files: list[tuple[str, int]]
    """name of each file (or data set) and its number of rows, in order"""

    def place(self, number: int) -> str:
        """The file of row `number` and the row's number in it (from 0), for messages.

        Raises IndexError where there is no such row.
        """
        for name, count in self.files:
            if number < count:
                return f"{name}: row {number}"
            number -= count
        raise IndexError(number)


def load_rows(source: Source) -> Rows:
    """All rows of the source's split in memory. Raises UserError as stream_rows does."""
    rows: list[Row] = []
    files = []
    for name, of_file in stream_rows(source):
        found = list(of_file)
        files.append((name, len(found)))
        rows += found
    return Rows(rows, files)


def stream_rows(source: Source) -> Iterator[tuple[str, Iterator[Row]]]:
    """The name of each file (or data set) of the split and its rows, read as they are asked for.

    Raises UserError where the split is not there, cannot be read or has no row.
    """
    if not is_local(source):
        yield f"{source.path} ({source.split})", hub_rows(source)
        return
    is_empty = True
    for file in files_of_split(local_path(source), source.split):
        rows = read_rows(file, source)
        first = next(rows, None)
        is_empty = is_empty and first is None
        yield str(file), chain([] if first is None else [first], rows)
    if is_empty:
        raise UserError(f"data.path: {source.path}: no rows")


def digest_of(file: Path) -> str:
    """SHA-256 of the file's content, unpacked."""
    try:
        with open_data(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def fingerprint(source: Source, digest_of: Callable[[Path], str] = digest_of) -> str:
    """A digest of the source's content: changes when any byte of its split does."""
    if not is_local(source):
        return str(load_hub(source)._fingerprint)
    digest = hashlib.sha256()
    for file in files_of_split(local_path(source), source.split):
        digest.update(bytes.fromhex(digest_of(file)))
    return digest.hexdigest()


def is_local(source: Source) -> bool:
    return local_path(source).exists() or looks_local(source.path)


def local_path(source: Source) -> Path:
    return Path(source.path).expanduser()


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as one: Hub ids are `name` or `owner/name`."""
    is_file_name = path.removesuffix(".gz").endswith(tuple(PARSERS))
    return is_file_name or path.startswith((".", "/", "~")) or path.count("/") > 1


def files_of_split(path: Path, split: str) -> list[Path]:
    """The data files of a split: those of a folder whose path has the split's name as a word.

    A single file is `train`, and so is a whole folder whose files name no split (no train, test,
    validation, ...). Raises UserError where there is no such file.
    """
    if not path.exists():
        raise UserError(f"data.path: {path}: no such file or folder")
    if path.is_file():
        if suffix_of(path) not in PARSERS:
            raise UserError(f"data.path: {path}: unknown kind of file; allowed are {FILE_KINDS}")
        if split != "train":
            raise UserError(
                f"data.path: {path}: no split {split!r} in a file, which is train; name a folder"
            )
        return [path]
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and is_data(file.relative_to(path))
    )
    if not files:
        raise UserError(f"data.path: {path}: no data file in this folder; expected {FILE_KINDS}")
    names = [file.relative_to(path).as_posix().lower() for file in files]
    word = re.compile(rf"(?<![a-z]){re.escape(split.lower())}(?![a-z])")
    named = [file for file, name in zip(files, names, strict=True) if word.search(name)]
    if named or (split == "train" and not any(map(SPLIT_NAME.search, names))):
        return named or files
    found = ", ".join(file.name for file in files[:5])
    raise UserError(f"data.path: {path}: no file of split {split!r}; found {found}")


def is_data(path: Path) -> bool:
    """Whether the file at this path in a folder holds rows.

    Hidden files are copies of others: Jupyter's `.ipynb_checkpoints/`, the `._rows.jsonl` of macOS.
    """
    is_hidden = any(part.startswith(".") for part in path.parts)
    return suffix_of(path) in PARSERS and not is_hidden and path.name not in METADATA_FILES


def suffix_of(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def open_data(path: Path) -> io.BufferedReader:
    """The file's content, unpacked as it is read."""
    return io.BufferedReader(Unpacked(path) if path.suffix == ".gz" else io.FileIO(path))


class Unpacked(io.RawIOBase):
    """What a .gz unpacks to. Raises UserError where that is more than rows compress by."""

    def __init__(self, path: Path) -> None:
        self.path, self.stream = path, gzip.GzipFile(path)
        self.left = MAX_RATIO * path.stat().st_size + 2**20

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.stream.readinto(buffer)
        self.left -= count
        if self.left < 0:
            found = f"unpacks to more than {MAX_RATIO} times its size"
            raise UserError(f"{self.path}: {found}; unpack it first")
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def read_rows(path: Path, source: Source) -> Iterator[Row]:
    """The file's rows. Raises UserError where it cannot be read."""
    try:
        with open_data(path) as stream:
            if read_file := FILE_READERS.get(source.reader or ""):
                yield from read_file(json.loads(stream.read()), source.sessions)
            else:
                yield from PARSERS[suffix_of(path)](stream)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    except BadRow as error:
        raise UserError(f"{path}: {error}") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def parse_json(stream: BinaryIO) -> Iterator[Row]:
    """One JSON array of objects; lines of JSON under the wrong file name are read too."""
    head = b""
    for line in stream:
        head += line
        if line.removeprefix(codecs.BOM_UTF8).strip():
            break
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        content = (head + stream.read()).removeprefix(codecs.BOM_UTF8)
        for number, row in enumerate(json.loads(content)):
            yield checked_row(row, f"row {number}")
    else:
        yield from parse_jsonl(chain(io.BytesIO(head), stream))


def parse_jsonl(lines: Iterable[bytes]) -> Iterator[Row]:
    before = 0  # bytes of the lines above
    for number, line in enumerate(lines, start=1):
        text = decoded(line, before)
        before += len(line)
        if text.strip():
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
    # strict: a quote that is never closed is an error, instead of one field to the end of the file.
    lines = csv.DictReader(text, strict=True)
    try:
        names = lines.fieldnames or []
        if len(set(names)) < len(names):
            raise BadRow(f"line 1: two columns have the same name: {', '.join(names)}")
        for row in lines:
            if None in row or None in row.values():
                raise BadRow(f"line {lines.line_num}: not as many columns as the header")
            yield row
    except csv.Error as error:
        raise BadRow(f"line {lines.reader.line_num}: {error}") from None
    except UnicodeDecodeError:  # its place is counted from what was read last
        raise BadRow(f"line {lines.reader.line_num + 1} or below: is not UTF-8 text") from None


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


def checked_row(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise BadRow(f"{place}: expected an object, found {type(row).__name__}")
    return row


PARSERS: dict[str, Callable[[BinaryIO], Iterable[Row]]] = {
    ".jsonl": parse_jsonl,
    ".json": parse_json,
    ".csv": parse_csv,
    ".parquet": parse_parquet,
}
FILE_KINDS = f"{', '.join(PARSERS)}, also with .gz"


def hub_rows(source: Source) -> Iterator[Row]:
    table = load_hub(source)
    for start in range(0, len(table), BATCH):
        yield from table.select(range(start, min(start + BATCH, len(table)))).to_list()


def load_hub(source: Source) -> Any:
    """The split as a datasets.Dataset. Raises UserError with the reason `datasets` gives."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return load_dataset(
            source.path, source.config, split=source.split, revision=source.revision
        )
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: a script
        reason: BaseException = error
        if type(error) is DatasetGenerationError and error.__cause__:
            reason = (
                error.__cause__
            )  # "An error occurred while generating the dataset" is no reason
        message = one_line(reason) or type(reason).__name__
        raise UserError(f"data.path: {source.path}: {message}") from None
