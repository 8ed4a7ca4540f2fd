"""Source -> rows.

A source is a local file (see file_kinds.py), a folder of such files, or a data set of the Hub.
Local files are read here and not by `datasets`: an unreadable line is named by its number, rows of
uneven columns are no error, and nothing heavy is imported.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from finetuning.data.configurations import configured_files
from finetuning.data.file_kinds import (
    BATCH,
    FILE_KINDS,
    METADATA_FILES,
    PARSERS,
    SPLIT_NAME,
    UNREADABLE,
    open_data,
    parse_json,
    splits_of,
    suffix_of,
)
from finetuning.data.readers import FILE_READERS
from finetuning.data.row import BadRow, Row
from finetuning.data.section import Source
from finetuning.errors import UserError, one_line


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
    for file in local_files(source):
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
    for file in local_files(source):
        digest.update(bytes.fromhex(digest_of(file)))
    return digest.hexdigest()


def is_local(source: Source) -> bool:
    return local_path(source).exists() or looks_local(source.path)


def local_path(source: Source) -> Path:
    return Path(source.path).expanduser()


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as one: Hub ids are `name` or `owner/name`."""
    return (
        suffix_of(Path(path)) in PARSERS or path.startswith((".", "/", "~")) or path.count("/") > 1
    )


def local_files(source: Source) -> list[Path]:
    """The data files of a local source, in order.

    Raises UserError where there are none, or where it has no such configuration or revision.
    """
    path = local_path(source)
    if source.revision:
        raise UserError(f"data.revision: {path} is local: only a Hub data set has revisions")
    files = configured_files(path, source.config, source.split)
    return files_of_split(path, source.split) if files is None else files


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
        if split != "train" and split not in splits_in(path):
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


def splits_in(file: Path) -> list[str]:
    """The splits of a file that is `{"train": [...], "test": [...]}`."""
    if PARSERS[suffix_of(file)] is not parse_json:
        return []
    try:
        with open_data(file) as stream:
            return list(splits_of(json.loads(stream.read())))
    except (*UNREADABLE, ValueError, RecursionError):  # told where its rows are read
        return []


def is_data(path: Path) -> bool:
    """Whether the file at this path in a folder holds rows.

    Hidden files are copies of others: Jupyter's `.ipynb_checkpoints/`, the `._rows.jsonl` of macOS.
    """
    is_hidden = any(part.startswith(".") for part in path.parts)
    is_about = path.name in METADATA_FILES or path.match("cache-*.arrow")
    return suffix_of(path) in PARSERS and not is_hidden and not is_about


def read_rows(path: Path, source: Source) -> Iterator[Row]:
    """The file's rows. Raises UserError where it cannot be read."""
    try:
        with open_data(path) as stream:
            if read_file := FILE_READERS.get(source.reader or ""):
                yield from read_file(json.loads(stream.read()), source.sessions)
            else:
                parse = PARSERS[suffix_of(path)]
                yield from parse(stream, source.split) if parse is parse_json else parse(stream)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    except BadRow as error:
        raise UserError(f"{path}: {error}") from None
    except UserError:
        raise
    except (*UNREADABLE, ValueError) as error:  # ValueError: a number of thousands of digits
        raise UserError(f"{path}: cannot be read: {error}") from None


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
