"""Whether a local model folder holds all its weights, told from its files."""

import json
from pathlib import Path

from finetuning.errors import UserError, one_line
from finetuning.model.location import location
from finetuning.recipe.sections import Model

SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLED = (
    "has its weights only as a pickle (.bin), which can run code; save them as safetensors: "
    'AutoModelForCausalLM.from_pretrained(...).save_pretrained("base")'
)


def require_weight_files(model: Model) -> bool:
    """Whether there was a local folder to look at.

    Raises UserError where its weights are missing or cut off.
    """
    if model.name is None or not Path(location(model)).is_dir():
        return False
    folder = Path(location(model))
    for file in weight_files(folder):
        if not file.is_file():
            raise UserError(f"model.name: {folder} lacks {file.name}, a part of its weights")
        require_whole(file)
    return True


def weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / SHARDED).exists():
        return shards(folder / SHARDED)
    if any((folder / name).exists() for name in PICKLES):
        raise UserError(f"model.name: {folder} {PICKLED}")
    raise UserError(f"model.name: {folder} has no weights; expected {SINGLE} or {SHARDED}")


def shards(index: Path) -> list[Path]:
    try:
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.parent / part for part in sorted(parts)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.name: {index} cannot be read: {one_line(error)}") from None


def require_whole(file: Path) -> None:
    """Reads the header, which says how long the file has to be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.name: {file} is damaged: {one_line(error)}") from None
