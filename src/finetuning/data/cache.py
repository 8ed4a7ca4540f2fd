"""Prepared examples on disk: the same recipe, rows, tokenizer and code are tokenized once."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tqdm import tqdm

from finetuning.data.prepare import build
from finetuning.data.section import Data
from finetuning.data.sources import digest_of, fingerprint
from finetuning.data.storage import Prepared, open_private, read_prepared
from finetuning.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from transformers import PreTrainedTokenizerFast

SILENT, MAX_WAIT = 5, 7200  # seconds until the wait for a lock is reported, and ends
NOTED_SIZE = 2**24  # bytes of a file whose digest is noted; a smaller one takes 10 ms to read
SETTLED = 2 * 10**9  # nanoseconds
# Settings that do not change the examples
NOT_THE_EXAMPLES = {"layout", "order", "batch_tokens", "num_proc"}
# Modules of this package that no example depends on; an edit of any other makes the cache stale.
NOT_THE_PIPELINE = {
    *("__init__", "cache"),
    *("batch_sampler", "bin_packing", "collator", "dummies", "example_set"),
}
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

    try:
        make_private(cache)
        key = cache_key(data, tokenizer, cache)
        folder, lock = cache / key, FileLock(cache / f"{key}.lock", mode=0o600)
        wait_for(lock)
    except (OSError, Timeout) as error:  # a read-only home, say
        tqdm.write(f"not cached: {cache}: {getattr(error, 'strerror', 'the lock is still held')}")
        return prepare_aside(data, tokenizer)
    try:
        if (prepared := read_prepared(folder)) is None:
            build_in(folder, data, tokenizer)
            if cache_key(data, tokenizer, cache) != key:
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


def remembered_digest(cache: Path, file: Path) -> str:
    """digest_of a file, from a note of it if the file was not touched since.

    Any change of a file, also one that sets its times back, gives it another ctime. The file system
    counts that in ticks, so a file that was changed just now is not noted: it may change once more.
    """
    stat = file.stat()
    if stat.st_size < NOTED_SIZE:
        return digest_of(file)
    state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    name = json.dumps([str(file.resolve()), state])
    note = cache / f"{hashlib.sha256(name.encode()).hexdigest()}.digest"
    if note.exists():
        return note.read_text()
    is_settled = time.time_ns() - stat.st_ctime_ns > SETTLED
    digest = digest_of(file)
    if is_settled:
        unfinished = note.with_suffix(f".{os.getpid()}.tmp")
        with open_private(unfinished) as out:
            out.write(digest.encode())
        unfinished.replace(note)
    return digest


def cache_folder() -> Path:
    """Where prepared examples are kept: beside the cache of the Hugging Face libraries."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "finetuning"


def cache_key(data: Data, tokenizer: "PreTrainedTokenizerFast", cache: Path | None = None) -> str:
    """Digest of all that decides the examples: rows, settings, tokenizer and this package's code.

    With the code in it, the result of an edited reader is never read from the cache.
    """
    digest_of_file = partial(remembered_digest, cache) if cache else digest_of
    sources = data.sources
    if data.eval and data.eval.split:
        split = {"split": data.eval.split}
        sources += [source.model_copy(update=split) for source in sources]
    rows = [fingerprint(source, digest_of_file) for source in sources]
    settings = data.model_dump(exclude=NOT_THE_EXAMPLES)
    code = [path.read_text(encoding="utf-8") for path in PIPELINE]
    tokens = [tokenizer.special_tokens_map, tokenizer.chat_template, tokenizers.__version__]
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps([rows, settings, code, tokens], sort_keys=True, default=str).encode())
    return digest.hexdigest()
