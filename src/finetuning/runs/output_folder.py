"""training.output_dir: a folder that a run may write to, and that no other run writes to."""

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetuning.errors import UserError
from finetuning.hub.manifest import NAME
from finetuning.recipe.recipe import Recipe
from finetuning.runs.checkpoints import SEAL
from finetuning.runs.environment import read_environment
from finetuning.runs.folder import ANSWERS, REFERENCE

LOCK = ".lock"
# What a run, or a preview, writes before it has written recipe.yaml and environment.json.
BEGUN = {
    *(LOCK, "preview", "runs", "wandb", "samples.json", "samples.md", "recipe.yaml"),
    *(ANSWERS, REFERENCE),
}


def require_free_or_ours(folder: Path) -> None:
    """Raises UserError where the folder holds what no run has written, or a link.

    A run writes files of many names, config.json and README.md among them: `.`, `~/.docker` or a
    repository as training.output_dir would lose theirs. What a run has written is told by its
    recipe.yaml and environment.json, or by there being nothing else yet.
    """
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    except (OSError, ValueError) as error:  # no file system has such a name, or it is hidden
        raise UserError(f"training.output_dir: {folder} cannot be used: {error}") from None
    if links := [path.name for path in found if path.is_symlink()]:
        raise UserError(
            f"training.output_dir: {folder} holds a link, {links[0]}, through which files "
            "elsewhere would be written; delete it, or choose another folder"
        )
    names = {path.name for path in found}
    if "recipe.yaml" in names and names & {"environment.json", SEAL}:
        return
    if foreign := sorted(name for name in names - BEGUN if not name.endswith(".tmp")):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"training.output_dir: {folder} is not a run folder: it holds {foreign[0]}{more}, "
            "which could be overwritten; choose a folder that is empty or new"
        )


def require_local_output(file: Path, recipe: Recipe, overrides: Sequence[str]) -> None:
    """Raises UserError where a pulled recipe chooses a folder outside the current one.

    A recipe with a manifest beside it is somebody else's; where files are written is for the person
    to say, as an override.
    """
    if not file.with_name(NAME).is_file():
        return
    if any(override.startswith(("training.output_dir=", "training=")) for override in overrides):
        return
    path = Path(recipe.training.output_dir)
    if path.is_absolute() or any(part.startswith(("~", ".")) for part in path.parts):
        raise UserError(
            f"training.output_dir: {path} is chosen by a recipe that was pulled, and is not a "
            "folder below the current one; say where to write: training.output_dir=outputs/again"
        )


def lock(folder: Path) -> AbstractContextManager[Any]:
    """Held from now to the end of the context, or of the process, however it ends.

    Raises UserError where another process holds it.
    """
    with suppress(PermissionError):  # a lock that others may open is one that they may hold
        (folder / LOCK).touch(mode=0o600)
        (folder / LOCK).chmod(0o600)
    try:
        return FileLock(folder / LOCK, mode=0o600).acquire(blocking=False)
    except Timeout:
        launches = read_environment(folder).get("launches") or [{}]
        who = (
            f" (process {launches[-1]['process']} on {launches[-1]['host']})"
            if "process" in launches[-1]
            else ""
        )
        raise UserError(
            f"{folder} is in use: another run writes to it{who}; wait for its end, or choose "
            "another folder with training.output_dir=..."
        ) from None


def output_folder(recipe: Recipe) -> Path:
    """Where the recipe's run is, or will be. Raises UserError for the home of nobody, `~x`."""
    try:
        return Path(recipe.training.output_dir).expanduser()
    except RuntimeError as error:
        raise UserError(f"training.output_dir: {recipe.training.output_dir}: {error}") from None


def make_folder(folder: Path) -> Path:
    """The folder, which exists and can be written. Raises UserError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise UserError(
            f"training.output_dir: {folder} cannot be written: {getattr(error, 'strerror', error)}"
        ) from None
    return folder
