"""The models of an evaluation, as they are named: run folders, recipes, addresses on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.hub.access import require_hub
from finetuning.hub.address import PREFIX
from finetuning.inference.resolve import find_trained_model
from finetuning.launch.hub_needs import base_needs
from finetuning.model.quantization import hide_bitsandbytes
from finetuning.recipe.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Model:
    """A trained model, as it was named."""

    name: str
    folder: Path
    recipe: Recipe
    has_base: bool = False
    """ask its base model too, first"""

    def record(self) -> dict[str, Any]:
        """What decides its answers."""
        return {
            "name": self.name,
            "folder": str(self.folder.absolute()),
            "quantization": self.recipe.model.quantization,
            "generation": self.recipe.generation.model_dump(exclude={"prompts"}),
            "base": self.has_base,
        }


def find_models(
    names: Sequence[str], overrides: list[str], with_base: bool, output: Path | None
) -> tuple[list[Model], Path]:
    """(the models, the folder of the results): `output`, or evaluation/ in the first run folder.

    Raises UserError where there is no trained model of a name, or no base model for it.
    """
    models, folder = [], output
    for name in names:
        path, recipe_file = find_trained_model(name)
        recipe = load_recipe(recipe_file, overrides)
        require_hub(base_needs(recipe, path))
        models.append(Model(name, path, recipe, with_base))
        is_ours = not name.startswith(PREFIX) and (recipe_file.parent / "environment.json").exists()
        folder = folder or (recipe_file.parent if is_ours else Path()) / "evaluation"
    assert folder is not None
    quantized = [model.recipe for model in models if model.recipe.model.quantization]
    hide_bitsandbytes(quantized[0] if quantized else models[0].recipe)
    return models, folder
