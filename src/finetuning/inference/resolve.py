"""Which trained model a name means: a run folder, a recipe's run folder, else what it published."""

import sys
from pathlib import Path

from finetuning.errors import UserError
from finetuning.hub.address import PREFIX, Address, parse_address
from finetuning.hub.allowed_files import ADAPTER_WEIGHTS
from finetuning.hub.download import pull
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.folder import find_run_folder, has_model, means_folder, output_folder


def find_trained_model(name: str) -> tuple[Path, Path]:
    """(folder of a trained model, its recipe): of a run folder, a recipe or an address on the Hub.

    A recipe's run folder comes first, then the place where the recipe publishes; which one it is, is said.
    """
    if name.startswith(PREFIX):
        folder = pull(read_address(name)).folder
        if not (folder / "recipe.yaml").is_file():
            raise UserError(
                f"{name} has no recipe.yaml that says how to ask it; give a recipe that publishes there"
            )
        return folder, folder / "recipe.yaml"
    is_recipe = not means_folder(name)
    if is_recipe:
        recipe = load_recipe(name)
        if recipe.publish and not has_model(output_folder(recipe)):
            folder = pull_published(recipe, name)
            return folder, folder / "recipe.yaml" if (folder / "recipe.yaml").is_file() else Path(
                name
            )
    folder = find_run_folder(name)
    if is_recipe:
        print(f"taken from the run folder: {folder}", file=sys.stderr)
    return folder, folder / "recipe.yaml"


def pull_published(recipe: Recipe, name: str) -> Path:
    """The recipe's published model, where there is no run folder."""
    local = output_folder(recipe)
    try:
        snapshot = pull(Address(recipe.publish.repo, recipe.publish.subfolder))
    except UserError as error:
        raise type(error)(
            f"{local} has no trained model, and {error}; train it: accelerate launch src/sft.py {name}"
        ) from None
    print(f"{local} has no trained model; taken from the Hub: {snapshot.address}", file=sys.stderr)
    return snapshot.folder


def read_address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise UserError(str(error)) from None


def pin_base_model(recipe: Recipe) -> Recipe:
    """The recipe with its base model pulled and pinned to a commit, if that is a published model.

    Without a revision: the newest commit, or for a run that is resumed the one it began with, since
    every publication to the repository makes a new one.
    """
    if not (recipe.model.name or "").startswith(PREFIX):
        return recipe
    requested, begun = parse_address(recipe.model.name), output_folder(recipe) / "recipe.yaml"
    if requested.revision is None and begun.is_file():
        name = load_recipe(begun).model.name or ""
        if name.startswith(f"{requested}@"):
            requested = parse_address(name)
    snapshot = pull(requested)
    if (snapshot.folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"model.name: {snapshot.address} is an adapter; train on from full or merged weights"
        )
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"name": str(snapshot.address)})}
    )
