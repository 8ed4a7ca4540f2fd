"""Opening a data file, packed or not; a packed one is unpacked as it is read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetuning.errors import UserError

MAX_RATIO = 100  # of a packed file; texts compress by 3 to 20
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


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
