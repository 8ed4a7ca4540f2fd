"""What a recipe takes from the Hub."""

from pathlib import Path

from finetuning.data.sources import is_local, looks_local
from finetuning.errors import UserError
from finetuning.hub.access import Need
from finetuning.hub.address import PREFIX
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.recipe.schema import SCHEMA

RECIPES = SCHEMA.parent
OUTPUTS = "outputs"  # where the recipes of this repository have their run folders


def needs_of(recipe: Recipe) -> list[Need]:
    """What the recipe takes from the Hub.

    Raises UserError where a local model folder is not there, a run that is not trained yet among
    them.
    """
    needs = []
    name = recipe.model.name
    if name and Path(name).expanduser().is_file():
        raise UserError(f"model.name: {name} is a file; expected a folder or a Hub id")
    if name and not name.startswith(PREFIX) and not Path(name).expanduser().exists():
        if looks_local(name) or Path(name).parts[0] == OUTPUTS:
            raise UserError(f"model.name: {name}: no such folder{to_be_trained(name)}")
        needs.append(Need(name, "model", "model.name"))
    return needs + [
        Need(s.path, "dataset", "data.path") for s in recipe.data.sources if not is_local(s)
    ]


def to_be_trained(name: str) -> str:
    """Which recipe has its run in the folder of that name, and how it is trained; or nothing."""
    folder = Path(name)
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    for file in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(file)
        if Path(recipe.training.output_dir) == run:
            place = f"{RECIPES.name}/{file.name}"
            return f"; train it first: accelerate launch {recipe.script} {place}"
    return ""


def base_needs(recipe: Recipe, folder: Path) -> list[Need]:
    """What asking a trained model takes from the Hub: an adapter its base model, full weights
    nothing."""
    is_adapter = (folder / "adapter_config.json").exists()
    return [need for need in needs_of(recipe) if need.kind == "model"] if is_adapter else []
