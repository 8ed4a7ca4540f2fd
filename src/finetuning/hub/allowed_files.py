"""What a published model may consist of: safetensors, tokenizer, settings, texts. No code.

A list of what is allowed, not of what is refused: training_args.bin and the state of optimizers are
pickles, which run code when they are read, and training_args.bin may hold a token.
"""

import fnmatch
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.secrets import find_secrets

INDEX = "model.safetensors.index.json"
MODEL = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    INDEX,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = ("adapter_config.json", ADAPTER_WEIGHTS)
ADAPTER_FOLDER = "adapter"  # holds the adapter of merged weights

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)

GGUF = ("model-*.gguf", "Modelfile")  # weights for llama.cpp, and how Ollama asks them

RUN_RECORDS = ("samples.md", "metrics.jsonl")
GENERATED = ("recipe.yaml", "README.md", "loss.png", "manifest.json")  # when it is published

ALLOWED = (
    *MODEL,
    *ADAPTER,
    *(f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER),
    *TOKENIZER,
    *GGUF,
    *RUN_RECORDS,
    *GENERATED,
)

MAX_LAYERS = 1000  # of a model; the deepest have some 130

TEXTS = (".json", ".jsonl", ".jinja", ".md", ".txt", ".yaml", "Modelfile")


def is_publishable(name: str) -> bool:
    """Whether a published model may have a file of this name, relative to its folder."""
    return matches(name, ALLOWED)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is of this name; `*` does not match across a slash."""
    same_depth = (pattern for pattern in patterns if pattern.count("/") == name.count("/"))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in same_depth)


def matching_files(folder: Path, patterns: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of the folder's files that match.

    Raises UserError for a link: what it points to is not ours to publish.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not matches(name, patterns):
            continue
        if path.is_symlink() or not path.is_file():
            raise UserError(
                f"{path} is a link or not a file; only files of the run folder itself are published"
            )
        yield name, path


def unpublished_files(folder: Path) -> list[str]:
    """Names directly in a run folder that are not published."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if not is_publishable(name) and not name.startswith("."))


def require_weights(folder: Path, patterns: tuple[str, ...]) -> None:
    """Raises UserError unless the folder has whole weights (MODEL or ADAPTER), every shard."""
    from safetensors import SafetensorError, safe_open

    for name in weight_files(folder, patterns):
        if not is_publishable(name) or not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}")
        try:
            with safe_open(folder / name, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is damaged: {error}") from None


def weight_files(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Names of the files that hold the weights: the adapter, one file, or the index's shards."""
    if patterns == ADAPTER:
        return [ADAPTER_WEIGHTS]
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{folder / INDEX} is damaged: it names no files")
    if not shards:
        raise UserError(f"{folder / INDEX} is damaged: it names no files")
    return sorted(set(shards.values()))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object")
    return found


def require_no_remote_code(folder: Path) -> None:
    """Raises UserError where a config names code that would be fetched and run."""
    for path in filter(Path.is_file, (folder / "config.json", folder / "tokenizer_config.json")):
        if "auto_map" in read_json(path):
            raise UserError(
                f"{path} names code of its own (auto_map), which would be fetched and run; refused"
            )


def require_no_secret(name: str, source: Path | bytes) -> None:
    """Raises UserError where a text holds a secret, or the path of the person's home."""
    if not name.endswith(TEXTS):
        return
    content = source if isinstance(source, bytes) else source.read_bytes()
    text = content.decode(errors="replace")
    for start, _, kind in find_secrets(text):
        line = text.count("\n", 0, start) + 1
        raise UserError(f"{name}, line {line}: holds a secret ({kind}); take it out, and revoke it")
    home = f"{Path.home()}/"
    if len(home) > len("/a/") and home in text and not matches(name, TOKENIZER):
        line = text.count("\n", 0, text.index(home)) + 1
        raise UserError(f"{name}, line {line}: holds a path of your home folder; take it out")
