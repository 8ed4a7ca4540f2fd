"""Source -> rows.

A source is a local file (see file_kinds.py), a folder of such files, or a data set of the Hub.
Local files are read here and not by `datasets`: an unreadable line is named by its number, rows of
uneven columns are no error, and nothing heavy is imported.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from finetuning.data.configurations import configured_files
from finetuning.data.file_kinds import FILE_KINDS, PARSERS, is_data
from finetuning.data.json_files import members_of, parse_json, splits_in
from finetuning.data.packed_files import UNREADABLE, open_data, suffix_of
from finetuning.data.readers import FILE_READERS
from finetuning.data.row import BadRow, Row
from finetuning.data.section import Source
from finetuning.data.split_names import names_split
from finetuning.data.table_files import BATCH
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
        if split != "train" and split not in splits_of(path):
            raise UserError(
                f"data.path: {path}: no split {split!r} in a file, which is train; name a folder"
            )
        return [path]
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and is_data(file.relative_to(path))
    )
    if not files:
        raise UserError(f"data.path: {path}: no data file in this folder; expected {FILE_KINDS}")
    names = [file.relative_to(path).as_posix() for file in files]
    named = [file for file, name in zip(files, names, strict=True) if names_split(name, split)]
    if named or (split == "train" and not any(map(names_split, names))):
        return named or files
    found = ", ".join(file.name for file in files[:5])
    raise UserError(f"data.path: {path}: no file of split {split!r}; found {found}")


def splits_of(file: Path) -> list[str]:
    """The splits of a file that is `{"train": [...], "test": [...]}`."""
    if PARSERS[suffix_of(file)] is not parse_json:
        return []
    try:
        return splits_in(members_of(file) or {})
    except (*UNREADABLE, ValueError, RecursionError):  # told where its rows are read
        return []


def read_rows(path: Path, source: Source) -> Iterator[Row]:
    """The file's rows. Raises UserError where it cannot be read."""
    try:
        if read_file := FILE_READERS.get(source.reader or ""):
            with open_data(path) as stream:
                document = json.loads(stream.read())
            yield from read_file(document, source.sessions)
        else:
            yield from PARSERS[suffix_of(path)](path, source.split)
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
