"""The run folder that a name means: its own path, or that of its recipe."""

from pathlib import Path

from finetuning.errors import UserError
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.checkpoints import RECOVER, size_damage
from finetuning.runs.folder import has_model
from finetuning.runs.output_folder import output_folder


def find_run_folder(name: str) -> Path:
    """The run folder that was named, itself or by its recipe.

    Raises UserError where no trained model is in it.
    """
    path = Path(name).expanduser()
    recipe = path / "recipe.yaml" if means_folder(name) else path
    if recipe != path and not recipe.exists():
        raise UserError(f"{path} is not a run folder: it has no recipe.yaml")
    folder = path if recipe != path else output_folder(load_recipe(path))
    if damage := size_damage(folder):
        raise UserError(f"{folder}: {damage}; {RECOVER}")
    if not has_model(folder):
        script = load_recipe(recipe).script
        raise UserError(
            f"{folder} has no trained model; train it: accelerate launch {script} {recipe}"
        )
    return folder


def means_folder(name: str) -> bool:
    """Whether a run folder is named, not a recipe. Raises UserError where there is neither."""
    path = Path(name).expanduser()
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: no such run folder or recipe")
    return path.is_dir()
