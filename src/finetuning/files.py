"""Files that are whole or not there, links to them, and their SHA-256."""

import hashlib
import os
import shutil
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Whole or not at all: written aside, then renamed. What was half written is removed."""
    unfinished = file.with_name(f".{file.name}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(file)
    except OSError:  # a full disk: what was begun takes room
        unfinished.unlink(missing_ok=True)
        raise


def sha256_of(file: Path) -> str:
    """The file's SHA-256, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def link_or_copy(source: Path, place: Path) -> None:
    """The same file under another name, on file systems that can; a copy on others."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
