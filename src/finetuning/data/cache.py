"""Prepared examples, kept: the same recipe, rows, tokenizer and code are tokenized once on a machine."""

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
    from transformers import PreTrainedTokenizerFast


PIPELINE = (
    "sources",
    "row",
    "readers",
    "harry_potter",
    "templates",
    "chat_template",
    "tokenization",
    "section",
    "prepare",
)  # modules between a row and its examples


def prepare(
    data: Data, tokenizer: "PreTrainedTokenizerFast", cache: Path | None = None
) -> Prepared:
    """The examples of the recipe's data section.

    With a cache folder, the first process of a machine to ask does the work and the others read its result. Raises
    UserError where rows do not fit or nothing is left to train on.
    """
    if cache is None:
        return build(data, tokenizer)
    from filelock import FileLock

    key = cache_key(data, tokenizer)
    file, lock = cache / f"{key}.npz", FileLock(cache / f"{key}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:  # a read-only home, say
        tqdm.write(f"not cached: {cache}: {error.strerror}")
        return build(data, tokenizer)
    try:
        if (prepared := read_cache(file)) is None:
            prepared = build(data, tokenizer)
            write_cache(file, prepared)
    finally:
        lock.release()
    return prepared


def cache_folder() -> Path:
    """Where prepared examples are kept: beside what the Hugging Face libraries cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "finetuning"


def cache_key(data: Data, tokenizer: "PreTrainedTokenizerFast") -> str:
    """Digest of all that decides the examples, this package's code included: an edited reader is never served stale."""
    parts = [fingerprint(source) for source in data.sources]
    if data.eval and data.eval.split:
        parts += [
            fingerprint(source.model_copy(update={"split": data.eval.split}))
            for source in data.sources
        ]
    settings = data.model_dump(exclude={"layout", "order", "batch_tokens"})
    code = [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in PIPELINE]
    words = [tokenizer.special_tokens_map, tokenizer.chat_template, tokenizers.__version__]
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps([parts, settings, code, words], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def read_cache(file: Path) -> Prepared | None:
    """What write_cache wrote, or None if it is not there or any byte of it has changed."""
    try:
        whole = file.read_bytes()
    except OSError:
        return None
    content, digest = whole[:-32], whole[-32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with np.load(io.BytesIO(content)) as arrays:
        report, fingerprint = json.loads(str(arrays["report"])), str(arrays["fingerprint"])
        names = Examples.__dataclass_fields__
        train, held = (
            Examples(*(arrays[f"{part}.{name}"] for name in names))
            if f"{part}.rows" in arrays
            else None
            for part in ("train", "eval")
        )
    return Prepared(train, held, report, fingerprint)


def write_cache(file: Path, prepared: Prepared) -> None:
    """An .npz file with its own SHA-256 at the end: zip does not check the names and places of what it holds."""
    parts = {"train": prepared.train, **({"eval": prepared.eval} if prepared.eval else {})}
    arrays = {
        f"{part}.{name}": value
        for part, examples in parts.items()
        for name, value in vars(examples).items()
    }
    stream = io.BytesIO()
    np.savez(stream, report=json.dumps(prepared.report), fingerprint=prepared.fingerprint, **arrays)
    content = stream.getvalue()
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content + hashlib.sha256(content).digest())
        unfinished.replace(file)
    except OSError as error:  # a full disk costs the next run some seconds, not this run
        unfinished.unlink(missing_ok=True)
        tqdm.write(f"not cached: {file}: {error.strerror}")
