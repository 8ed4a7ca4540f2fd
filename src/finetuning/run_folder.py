"""The run folder: what one run leaves behind, enough to ask, publish or resume it.

recipe.yaml        every setting, as resolved          metrics.jsonl   one JSON object per logged step
environment.json   versions, git revision, data        samples.md      answers before and after
model.safetensors or adapter_model.safetensors, tokenizer.json, ...    checkpoint-N/   to continue from
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.recipe import Recipe, load_recipe

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "deepspeed", "bitsandbytes")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def open_run_folder(recipe: Recipe, fingerprint: str) -> Path:
    """Creates the folder, or finds it unfinished and of the same recipe and data, ready to continue.

    Raises UserError where it belongs to another run, is finished, or cannot be written.
    """
    folder = make_folder(output_folder(recipe))
    if (folder / "recipe.yaml").exists():
        remedy = "; delete the folder, or choose another with training.output_dir=..."
        for name, before, now in differences(load_recipe(folder / "recipe.yaml").resolved(), recipe.resolved()):
            raise UserError(f"{folder} belongs to another run: {name} was {before!r}, is {now!r}{remedy}")
        environment = read_environment(folder)
        if environment.get("data") not in (None, fingerprint):
            raise UserError(f"{folder} belongs to another run: its data was not the same{remedy}")
        if environment.get("finished"):
            raise UserError(f"{folder} is finished ({environment['finished']}){remedy}")
    return folder


def output_folder(recipe: Recipe) -> Path:
    return Path(recipe.training.output_dir).expanduser()


def make_folder(folder: Path) -> Path:
    """The folder, which exists and can be written. Raises UserError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"training.output_dir: {folder} cannot be written: {error.strerror}") from None
    return folder


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(setting, value before, value now) of every setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def write_start(folder: Path, recipe: Recipe, fingerprint: str, launch: dict[str, Any]) -> None:
    """recipe.yaml and environment.json, before the first step: a run that dies explains itself too."""
    write_text(folder / "recipe.yaml", recipe.as_yaml())
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "git": git_revision(),
        "data": fingerprint,
        "launch": {"arguments": sys.argv, **launch},
        "started": now(),
        "finished": None,
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def write_finish(folder: Path) -> None:
    environment = {**read_environment(folder), "finished": now()}
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def read_environment(folder: Path) -> dict[str, Any]:
    file = folder / "environment.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        raise UserError(f"{file} is damaged; delete the folder, or choose another training.output_dir") from None


def append_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(metrics) + "\n")


def write_samples(folder: Path, samples: list[tuple[str, str, str]]) -> None:
    """samples.md of (question, answer before, answer after)."""
    parts = ["# Answers before and after training\n"]
    for question, before, after in samples:
        parts.append(f"## {question}\n\nBefore:\n\n{quoted(before)}\n\nAfter:\n\n{quoted(after)}\n")
    write_text(folder / "samples.md", "\n".join(parts))


def quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def find_run_folder(name: str) -> Path:
    """The run folder that was named, itself or by its recipe. Raises UserError where no trained model is in it."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "recipe.yaml").exists():
            raise UserError(f"{path} is no run folder: it has no recipe.yaml")
        folder, remedy = path, f"train it: accelerate launch src/sft.py {path / 'recipe.yaml'}"
    else:
        folder, remedy = output_folder(load_recipe(path)), f"train it: accelerate launch src/sft.py {path}"
    if not any((folder / weights).exists() for weights in WEIGHTS):
        raise UserError(f"{folder} has no trained model; {remedy}")
    return folder


def write_text(file: Path, text: str) -> None:
    """Whole or not at all: written aside, then renamed."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of this code, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
