"""Prepared rows are the person's own: nobody else reads them, puts others there, or holds the
start."""

import os
from pathlib import Path

import pytest
import tiny
from filelock import FileLock, Timeout

from finetuning.data import cache
from finetuning.data.cache import prepare
from finetuning.data.section import Data
from finetuning.data.storage import INDEX, read_prepared

ROWS = '{"prompt": "a", "response": "b"}\n' * 4


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return Data(
        path=str(tmp_path / "rows.jsonl"), reader="prompt_response", template="question_answer"
    )


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_cache_is_readable_by_its_owner_only(data, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o777)
    prepare(data, tiny.byte_level(), folder)
    assert mode(folder) == 0o700
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {mode(path) for path in files} == {0o600}
    assert {mode(path) for path in folder.iterdir() if path.is_dir()} == {0o700}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make files of another user")
def test_what_another_user_put_there_is_not_read(data, tmp_path, capsys):
    tokenizer, folder = tiny.byte_level(), tmp_path / "cache"
    prepare(data, tokenizer, folder)
    prepared = next(folder.glob(f"*/{INDEX}")).parent
    os.chown(prepared, 65534, -1)
    assert read_prepared(prepared) is None
    os.chown(folder, 65534, -1)
    assert prepare(data, tokenizer, folder).train is not None
    assert "the folder belongs to somebody else" in capsys.readouterr().out


def test_waiting_for_a_lock_is_told_and_ends(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "SILENT", 0.1)
    monkeypatch.setattr(cache, "MAX_WAIT", 0.1)
    lock = FileLock(tmp_path / "lock")
    other = FileLock(tmp_path / "lock")
    with other, pytest.raises(Timeout):
        cache.wait_for(lock)
    assert "waiting for another process that prepares the same rows" in capsys.readouterr().out
