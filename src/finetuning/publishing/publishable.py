"""The run that is published: which folder, whether others could use it, and its other forms."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuning.errors import UserError
from finetuning.export.exported import export, require_gguf
from finetuning.export.merging import merge
from finetuning.files import link_or_copy
from finetuning.hub import allowed_files
from finetuning.inference.resolve import whole_checkpoint
from finetuning.model.finite import require_finite_weights
from finetuning.publishing.portable import portable_recipe, publish_section
from finetuning.recipe.recipe import Recipe
from finetuning.runs.checkpoints import RECOVER, checkpoints_of, content_damage
from finetuning.runs.folder import RunFolder, has_model
from finetuning.runs.lookup import find_run_folder

GGUF_TYPE = "f16"  # what is published


def require_publishable(run: RunFolder, recipe: Recipe, unfinished: bool) -> None:
    """Raises UserError for a run that others could not use, before anything is asked of the Hub."""
    folder, publish = run.path, publish_section(recipe)
    if not unfinished and not run.is_finished:
        raise UserError(
            f"{folder} is not finished; the command that began it resumes it, "
            "--unfinished publishes it as it is"
        )
    if damage := content_damage(folder):
        raise UserError(f"{folder}: {damage}; {RECOVER}")
    weights = allowed_files.ADAPTER if recipe.lora else allowed_files.MODEL
    allowed_files.require_weights(folder, weights)
    allowed_files.require_no_remote_code(folder)
    require_finite_weights(folder)
    if publish.gguf:
        require_gguf()
    if recipe.lora and (publish.adapter or not publish.merged):
        require_public_base(run, recipe)


def require_public_base(run: RunFolder, recipe: Recipe) -> None:
    """Raises UserError where others cannot have the base model that the adapter belongs to."""
    if recipe.model.from_scratch:
        raise UserError(
            "an adapter on a base model from scratch is of no use to others; "
            "add publish.merged=true"
        )
    name = portable_recipe(recipe, run.environment.get("base_commit")).model.name
    if name is None or name.startswith("./"):
        raise UserError(
            f"the adapter's base model is the local folder {recipe.model.name}; name the Hub id "
            "it is a copy of, publish.base_model=owner/name, or publish full weights, "
            "publish.merged=true"
        )


def find_publishable(name: str, unfinished: bool) -> Path:
    """The run folder of that name; one without a model only if it may be `unfinished`."""
    folder = Path(name).expanduser()
    if unfinished and folder.is_dir() and not has_model(folder) and checkpoints_of(folder):
        return folder
    return find_run_folder(name)


@contextmanager
def with_model(folder: Path) -> Iterator[RunFolder]:
    """The run folder; of a stopped run one with its last whole checkpoint's model, for a while.

    Raises UserError where there is no whole one.
    """
    if has_model(folder):
        yield RunFolder(folder)
        return
    checkpoint = whole_checkpoint(folder, "last")
    model = (*allowed_files.TOKENIZER, *allowed_files.MODEL, *allowed_files.ADAPTER)
    records = (*allowed_files.RUN_RECORDS, "recipe.yaml", "environment.json", "samples.json")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".stopped-") as joined:
        for source, names in ((checkpoint, model), (folder, records)):
            for name, file in allowed_files.matching_files(source, names):
                link_or_copy(file, Path(joined, name))
        yield RunFolder(Path(joined))


@contextmanager
def merged_if_wanted(run: RunFolder, recipe: Recipe) -> Iterator[Path | None]:
    """A folder of the run's merged weights, deleted afterwards; None without publish.merged."""
    if not publish_section(recipe).merged:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".merged-") as weights:
        yield merge(run, recipe, Path(weights))


@contextmanager
def gguf_if_wanted(run: RunFolder, recipe: Recipe) -> Iterator[Path | None]:
    """A folder with the run's GGUF file and Modelfile, deleted afterwards; None if not wanted."""
    if not publish_section(recipe).gguf:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".gguf-") as folder:
        export(run.path, recipe, GGUF_TYPE, Path(folder))
        yield Path(folder)
