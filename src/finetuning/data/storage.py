"""Examples on disk: written as they come, sealed, and mapped into the memory of every process.

    <folder>/train.input_ids.npy  train.labels.npy  train.lengths.npy  train.rows.npy
             train.chosen.npy  train.shared.npy     of pairs
             eval.*.npy           the same of the evaluation set
             prepared.json        SHA-256 of what follows in it; report, fingerprint, files

The files are numpy's own: np.load(file, mmap_mode="r") reads one. Pages of a mapped file are in
memory once, whatever the number of processes, and the system takes them back when it needs room.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from finetuning.data.examples import Counts, Examples, ranges

Arrays = dict[str, NDArray[Any]]

INDEX = "prepared.json"
NAMES = [field.name for field in fields(Examples)]
OF_EXAMPLES = (
    "lengths",
    "rows",
    "chosen",
    "shared",
)  # of NAMES, those with a number for each example
CHUNK = 2**20  # tokens that are copied at once
# Bytes at the start of a file that its digest is of. More would make the start of a run on a
# billion tokens wait for the disk; a file that was cut short is known by its size.
CHECKED = 2**25


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on."""

    train: Examples
    eval: Examples | None
    report: dict[str, Any]
    """rows: {loaded, where, kept, train, eval}; dropped: {reason: rows}; cut: rows; of the kept
    rows tokens: {prompt, response, total, max} and end_mark_share (0..1); places: of the first few
    dropped rows of each reason; added_end_mark: of Template; spelled, merged: rows of Exceptions;
    empty: rows with an empty response; conversations: how many were made into more examples, else
    0; unused: columns;
    pairs: {chosen, rejected: mean trained tokens; chosen_longer, chosen_shorter: 0..1}, of pairs;
    duplicates: copies of earlier examples; leaked: evaluation examples whose prompt or response
    is trained"""
    fingerprint: str
    """digest of the examples: changes with any token, label or row number"""


class GrowingArrays:
    """Arrays that are appended to on disk, and mapped when they are whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.types = folder, dict[str, BinaryIO](), dict[str, Any]()

    def append(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if name not in self.files:
                self.files[name] = open_private(self.folder / f"{name}.growing")
                self.types[name] = array.dtype
            self.files[name].write(np.ascontiguousarray(array).data)

    def mapped(self) -> Arrays:
        """The arrays. Nothing is appended any more, and their files have no name any more."""
        arrays: Arrays = {}
        for name, file in self.files.items():
            file.close()
            path = self.folder / f"{name}.growing"
            # An empty file cannot be mapped.
            read = np.memmap if path.stat().st_size else np.fromfile
            arrays[name] = np.asarray(read(path, self.types[name]))
            path.unlink()
        return arrays


def write_examples(folder: Path, part: str, arrays: Arrays, numbers: Counts, digest: Any) -> None:
    """Of the arrays of all examples, those of these numbers, in this order, with repeats.

    The digest is updated with every byte of every array.
    """
    lengths = arrays["lengths"][numbers]
    ends = np.cumsum(arrays["lengths"])
    for name in ("input_ids", "labels"):
        file = folder / f"{part}.{name}.npy"
        chunks = tokens_of(arrays[name], ends, arrays["lengths"], numbers)
        write_array(file, arrays[name].dtype, int(lengths.sum()), chunks, digest)
    for name in [each for each in OF_EXAMPLES if each in arrays]:
        file, array = folder / f"{part}.{name}.npy", arrays[name][numbers]
        write_array(file, array.dtype, len(array), iter([array]), digest)


def tokens_of(
    flat: NDArray[Any], ends: Counts, lengths: Counts, numbers: Counts
) -> Iterator[NDArray[Any]]:
    """The tokens of the examples of these numbers, some examples at a time."""
    chunk_of = np.cumsum(lengths[numbers]) // CHUNK
    for of_chunk in np.split(numbers, np.flatnonzero(np.diff(chunk_of)) + 1):
        yield flat[ranges((ends - lengths)[of_chunk], lengths[of_chunk])]


def write_array(
    file: Path, dtype: np.dtype[Any], size: int, chunks: Iterator[NDArray[Any]], digest: Any
) -> None:
    """An .npy file of an array (size,) that is not in memory as a whole."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (size,),
    }
    with open_private(file) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for chunk in chunks:
            digest.update(chunk.data)
            out.write(chunk.data)


def open_private(file: Path) -> BinaryIO:
    """A new file that this user alone may read."""
    return open(file, "xb", opener=partial(os.open, mode=0o600))


def seal(folder: Path, report: dict[str, Any], fingerprint: str) -> None:
    """Makes the folder's files what read_prepared takes for whole."""
    files = {}
    for file in sorted(folder.glob("*.npy")):
        with file.open("rb") as stream:
            os.fsync(stream)  # or a power cut leaves a file of the right size and no content
        files[file.name] = described(file)
    index = {"report": report, "fingerprint": fingerprint, "files": files}
    text = json.dumps(index)
    with open_private(folder / INDEX) as out:
        out.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())
        out.flush()
        os.fsync(out)


def described(file: Path) -> list[int | str]:
    """Size of the file and digest of its beginning."""
    with file.open("rb") as stream:
        beginning = hashlib.sha256(stream.read(CHECKED)).hexdigest()
    return [file.stat().st_size, beginning]


def read_prepared(folder: Path) -> Prepared | None:
    """What was sealed there; None if it is not there, not whole or another user's."""
    try:
        if folder.stat().st_uid != os.getuid():
            return None
        digest, _, text = (folder / INDEX).read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return None
        index = json.loads(text)
        for name, found in index["files"].items():
            if described(folder / name) != found:
                return None
        has_eval = "eval.rows.npy" in index["files"]
        return Prepared(
            train=read_examples(folder, "train"),
            eval=read_examples(folder, "eval") if has_eval else None,
            report=index["report"],
            fingerprint=index["fingerprint"],
        )
    except (OSError, UnicodeDecodeError):
        return None


def read_examples(folder: Path, part: str) -> Examples:
    files = {name: folder / f"{part}.{name}.npy" for name in NAMES}
    # As plain arrays: a part of a np.memmap is one too, which takes twice the time to make.
    return Examples(
        **{name: np.asarray(np.load(file, "r")) for name, file in files.items() if file.is_file()}
    )
