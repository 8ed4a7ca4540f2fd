"""What a recipe takes from the Hub."""

from pathlib import Path

from finetuning.data.sources import is_local, looks_local
from finetuning.errors import UserError
from finetuning.hub.access import Need
from finetuning.hub.address import PREFIX
from finetuning.recipe.recipe import Recipe


def needs_of(recipe: Recipe) -> list[Need]:
    """What the recipe takes from the Hub.

    Raises UserError where a local model folder is not there.
    """
    needs = []
    name = recipe.model.name
    if name and not name.startswith(PREFIX) and not Path(name).expanduser().exists():
        if looks_local(name):
            raise UserError(f"model.name: {name}: no such folder")
        needs.append(Need(name, "model", "model.name"))
    return needs + [
        Need(s.path, "dataset", "data.path") for s in recipe.data.sources if not is_local(s)
    ]


def base_needs(recipe: Recipe, folder: Path) -> list[Need]:
    """What asking a trained model takes from the Hub: an adapter its base model, full weights
    nothing."""
    is_adapter = (folder / "adapter_config.json").exists()
    return [need for need in needs_of(recipe) if need.kind == "model"] if is_adapter else []
