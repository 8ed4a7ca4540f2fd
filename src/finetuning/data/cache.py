"""Prepared examples on disk: the same recipe, rows, tokenizer and code are tokenized once."""

import errno
import hashlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from tqdm import tqdm

from finetuning.data.prepare import Prepared, build
from finetuning.data.section import Data
from finetuning.data.sources import fingerprint
from finetuning.data.tokenization import Examples

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from transformers import PreTrainedTokenizerFast

SILENT, MAX_WAIT = 5, 7200  # seconds until the wait for a lock is reported, and ends
DIGEST_BYTES = hashlib.sha256().digest_size
NOT_THE_EXAMPLES = {"layout", "order", "batch_tokens"}  # settings that only arrange examples
# Modules of this package that no example depends on; an edit of any other makes the cache stale.
NOT_THE_PIPELINE = {"__init__", "batching", "bin_packing", "cache"}
PIPELINE = sorted(
    path for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_THE_PIPELINE
)


def prepare(
    data: Data, tokenizer: "PreTrainedTokenizerFast", cache: Path | None = None
) -> Prepared:
    """The examples of the recipe's data section.

    With a cache folder, the first process of a machine does the work and the others read its
    result. Raises UserError where rows do not fit or nothing is left to train on.
    """
    if cache is None:
        return build(data, tokenizer)
    from filelock import FileLock, Timeout

    key = cache_key(data, tokenizer)
    file, lock = cache / f"{key}.npz", FileLock(cache / f"{key}.lock", mode=0o600)
    try:
        make_private(cache)
        wait_for(lock)
    except (OSError, Timeout) as error:  # a read-only home, say
        tqdm.write(f"not cached: {cache}: {getattr(error, 'strerror', 'the lock is still held')}")
        return build(data, tokenizer)
    try:
        if (prepared := read_cache(file)) is None:
            prepared = build(data, tokenizer)
            write_cache(file, prepared)
    finally:
        lock.release()
    return prepared


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


def read_cache(file: Path) -> Prepared | None:
    """What write_cache wrote; None if there is no file or any byte of it has changed."""
    try:
        if file.stat().st_uid != os.getuid():
            return None
        whole = file.read_bytes()
    except OSError:
        return None
    content, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with np.load(io.BytesIO(content)) as arrays:
        has_eval = "eval.rows" in arrays
        return Prepared(
            train=read_examples(arrays, "train"),
            eval=read_examples(arrays, "eval") if has_eval else None,
            report=json.loads(str(arrays["report"])),
            fingerprint=str(arrays["fingerprint"]),
        )


def read_examples(arrays: "np.lib.npyio.NpzFile", part: str) -> Examples:
    return Examples(**{name: arrays[f"{part}.{name}"] for name in Examples.__dataclass_fields__})


def write_cache(file: Path, prepared: Prepared) -> None:
    """An .npz file with its SHA-256 at the end: zip does not check the names and places of members.

    A file that cannot be written is reported and costs the next run some seconds, not this run.
    """
    parts = {"train": prepared.train, **({"eval": prepared.eval} if prepared.eval else {})}
    arrays = {
        f"{part}.{name}": array
        for part, examples in parts.items()
        for name, array in vars(examples).items()
    }
    stream = io.BytesIO()
    np.savez(stream, report=json.dumps(prepared.report), fingerprint=prepared.fingerprint, **arrays)
    content = stream.getvalue()
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(content + hashlib.sha256(content).digest())
        unfinished.replace(file)
    except OSError as error:  # a full disk, say
        unfinished.unlink(missing_ok=True)
        tqdm.write(f"not cached: {file}: {error.strerror}")
