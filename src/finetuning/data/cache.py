"""Prepared examples on disk: the same recipe, rows, tokenizer and code are tokenized once."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tqdm import tqdm

from finetuning.data.prepare import build
from finetuning.data.section import Data
from finetuning.data.sources import fingerprint
from finetuning.data.storage import Prepared, read_prepared
from finetuning.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from transformers import PreTrainedTokenizerFast

SILENT, MAX_WAIT = 5, 7200  # seconds until the wait for a lock is reported, and ends
# Settings that do not change the examples
NOT_THE_EXAMPLES = {"layout", "order", "batch_tokens", "num_proc"}
# Modules of this package that no example depends on; an edit of any other makes the cache stale.
NOT_THE_PIPELINE = {"__init__", "batching", "bin_packing", "cache"}
PIPELINE = sorted(
    path for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_THE_PIPELINE
)


def prepare(
    data: Data, tokenizer: "PreTrainedTokenizerFast", cache: Path | None = None
) -> Prepared:
    """The examples of the recipe's data section, mapped from disk.

    With a cache folder, the first process of a machine does the work and the others read its
    result. Raises UserError where rows do not fit, nothing is left to train on or the disk is full.
    """
    if cache is None:
        return prepare_aside(data, tokenizer)
    from filelock import FileLock, Timeout

    key = cache_key(data, tokenizer)
    folder, lock = cache / key, FileLock(cache / f"{key}.lock", mode=0o600)
    try:
        make_private(cache)
        wait_for(lock)
    except (OSError, Timeout) as error:  # a read-only home, say
        tqdm.write(f"not cached: {cache}: {getattr(error, 'strerror', 'the lock is still held')}")
        return prepare_aside(data, tokenizer)
    try:
        if (prepared := read_prepared(folder)) is None:
            build_in(folder, data, tokenizer)
            if cache_key(data, tokenizer) != key:
                shutil.rmtree(folder)
                raise UserError("the rows were changed while they were read; start again")
            prepared = read_prepared(folder)
    finally:
        lock.release()
    assert prepared is not None
    return prepared


def prepare_aside(data: Data, tokenizer: "PreTrainedTokenizerFast") -> Prepared:
    """Without a cache: the files have no name any more, and are gone when nobody maps them."""
    with tempfile.TemporaryDirectory(prefix="finetuning-") as folder:
        build_in(Path(folder, "prepared"), data, tokenizer)
        prepared = read_prepared(Path(folder, "prepared"))
    assert prepared is not None
    return prepared


def build_in(folder: Path, data: Data, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Whole or not at all: what is not whole has another name, and the next call removes it."""
    unfinished = folder.with_name(f"{folder.name}.tmp")
    try:
        for leftover in (folder, unfinished):
            if leftover.exists():
                shutil.rmtree(leftover)
        unfinished.mkdir(mode=0o700)
        build(data, tokenizer, unfinished)
        unfinished.rename(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f"{folder.parent}: {error.strerror}"
            raise UserError(
                f"{where}; prepared rows take 8 bytes a token there, and as much "
                "again while they are written (HF_HOME names another place)"
            ) from None
        raise


def make_private(folder: Path) -> None:
    """The folder, for this user alone: rows are in it, and whoever writes to it chooses them."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(errno.EACCES, "the folder belongs to somebody else", str(folder))
    folder.chmod(0o700)


def wait_for(lock: "BaseFileLock") -> None:
    """Holds the lock; says what is waited for. Raises Timeout after hours."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=SILENT)
    except Timeout:
        tqdm.write(f"waiting for another process that prepares the same rows: {lock.lock_file}")
        lock.acquire(timeout=MAX_WAIT)


def cache_folder() -> Path:
    """Where prepared examples are kept: beside the cache of the Hugging Face libraries."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "finetuning"


def cache_key(data: Data, tokenizer: "PreTrainedTokenizerFast") -> str:
    """Digest of all that decides the examples: rows, settings, tokenizer and this package's code.

    With the code in it, the result of an edited reader is never read from the cache.
    """
    rows = [fingerprint(source) for source in data.sources]
    if data.eval and data.eval.split:
        split = {"split": data.eval.split}
        rows += [fingerprint(source.model_copy(update=split)) for source in data.sources]
    settings = data.model_dump(exclude=NOT_THE_EXAMPLES)
    code = [path.read_text(encoding="utf-8") for path in PIPELINE]
    tokens = [tokenizer.special_tokens_map, tokenizer.chat_template, tokenizers.__version__]
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps([rows, settings, code, tokens], sort_keys=True, default=str).encode())
    return digest.hexdigest()
