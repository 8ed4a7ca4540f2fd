"""environment.json: versions, git revision, data and launches of a run."""

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.hub.access import loaded_commit
from finetuning.launch.software import git_revision, versions
from finetuning.recipe.recipe import Recipe


def write_start(folder: Path, recipe: Recipe, fingerprint: str, launch: dict[str, Any]) -> None:
    """recipe.yaml and environment.json, before the first step: a run that dies explains itself too.

    A resumed run keeps what was written first and adds its own launch.
    """
    first: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": git_revision(),
        "data": fingerprint,
        "base_commit": loaded_commit(recipe.model.name, recipe.model.revision)
        if recipe.model.name
        else None,
        "finished": None,
        "launches": [],
    }
    environment = {**first, **(known_environment(folder) or {}), "finished": None}
    launches = [*environment["launches"], {"started": now(), "arguments": sys.argv, **launch}]
    write_text(folder / "recipe.yaml", recipe.as_yaml())
    write_environment(folder, {**environment, "launches": launches})


def write_finish(folder: Path, kept_step: int) -> None:
    """`kept_step`: whose weights the run folder has, the last step's or the best's."""
    finish = {"finished": now(), "kept_step": kept_step}
    write_environment(folder, {**read_environment(folder), **finish})


@contextmanager
def recording_end(folder: Path, is_first: bool) -> Iterator[None]:
    """Notes when the launch ended, however it does but by a kill; the first process does it.

    One that ends before it is written down leaves those before it as they were.
    """
    before = len((known_environment(folder) or {}).get("launches", []))
    try:
        yield
    finally:
        environment = known_environment(folder) if is_first else None
        if environment and len(environment.get("launches", [])) > before:
            environment["launches"][-1]["ended"] = now()
            with suppress(OSError):  # a full disk must not hide why it ended
                write_environment(folder, environment)


def write_environment(folder: Path, environment: dict[str, Any]) -> None:
    write_text(
        folder / "environment.json", json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
    )


def read_environment(folder: Path) -> dict[str, Any]:
    """What environment.json holds, nothing without one. Raises UserError if it is damaged."""
    environment = known_environment(folder)
    if environment is None:
        raise UserError(
            f"{folder / 'environment.json'} is damaged; the command that began the run writes it "
            "anew, and needs a checkpoint or a moment for it"
        )
    return environment


def known_environment(folder: Path) -> dict[str, Any] | None:
    """As read_environment, but None if it is damaged."""
    file = folder / "environment.json"
    try:
        environment = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, IsADirectoryError):
        return None
    launches = environment.get("launches", []) if isinstance(environment, dict) else None
    is_whole = isinstance(launches, list) and all(isinstance(each, dict) for each in launches)
    return environment if is_whole else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
