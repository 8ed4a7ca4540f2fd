"""A file that is written aside is whole or not there."""

import hashlib
from pathlib import Path

import pytest

from finetuning.files import sha256_of, write_bytes, write_text


def test_what_is_written_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path):
    file = tmp_path / "answers.md"
    write_text(file, "old")
    write_text(file, "東京\n")
    assert file.read_text(encoding="utf-8") == "東京\n" and list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    write_text(file, "old")
    write = Path.write_bytes

    def fill_the_disk(path: Path, content: bytes) -> None:
        write(path, content[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"\x00" * 100_000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"\x00" * 100_000).hexdigest()
