"""Which trained model a name means: a run folder, a recipe's run folder, else what it published."""

import re
import sys
from pathlib import Path

from finetuning.errors import UserError
from finetuning.hub.address import PREFIX, Address, parse_address
from finetuning.hub.allowed_files import ADAPTER_WEIGHTS
from finetuning.hub.download import pull
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.recipe.sections import Publish
from finetuning.runs.checkpoints import checkpoints_of, damage_of, verify_newest_first
from finetuning.runs.folder import find_run_folder, has_model, means_folder, output_folder
from finetuning.untrusted_text import printable


def find_trained_model(name: str, step: str | None = None) -> tuple[Path, Path]:
    """(folder of a trained model, its recipe): of a run folder, a recipe or an address on the Hub.

    A recipe's run folder comes first, then the place where the recipe publishes; which one it is,
    is said. A step, a number or `last`, means that checkpoint of the run folder.
    """
    path = Path(name).expanduser()
    if step is None and (found := re.fullmatch(r"checkpoint-(\d+)", path.name)):
        path, step = path.parent, found[1]
    if step is not None:
        folder = path if path.is_dir() else output_folder(load_recipe(path))
        return whole_checkpoint(folder, step), folder / "recipe.yaml"
    if name.startswith(PREFIX):
        folder = pull(read_address(name)).folder
        if not (folder / "recipe.yaml").is_file():
            raise UserError(
                f"{name} has no recipe.yaml that says how to ask it; "
                "give a recipe that publishes there"
            )
        return folder, folder / "recipe.yaml"
    is_recipe = not means_folder(name)
    if is_recipe:
        recipe = load_recipe(name)
        if recipe.publish and not has_model(output_folder(recipe)):
            folder = pull_published(recipe.publish, output_folder(recipe), name)
            published = folder / "recipe.yaml"
            return folder, published if published.is_file() else Path(name)
    folder = find_run_folder(name)
    if is_recipe:
        print(printable(f"taken from the run folder: {folder}"), file=sys.stderr)
    return folder, folder / "recipe.yaml"


def whole_checkpoint(folder: Path, step: str) -> Path:
    """The run folder's checkpoint of that step, or its last.

    Raises UserError where there is no whole one.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml")
    checkpoint = folder / f"checkpoint-{step}"
    if step == "last":
        whole = [path for path, damage in verify_newest_first(folder) if damage is None]
        if not whole:
            raise UserError(f"{folder} has no whole checkpoint")
        checkpoint = whole[0]
    elif not checkpoint.is_dir():
        there = ", ".join(path.name for path in checkpoints_of(folder)) or "none"
        raise UserError(f"{folder} has no {checkpoint.name}; there are: {there}")
    elif damage := damage_of(checkpoint):
        raise UserError(f"{checkpoint} is not used: {damage}")
    if not has_model(checkpoint):
        raise UserError(
            f"{checkpoint} has no weights in one piece: each of several processes wrote a part; "
            "the run folder has them when the run is finished"
        )
    return checkpoint


def pull_published(publish: Publish, local: Path, name: str) -> Path:
    """The published model of the recipe of that name, whose run folder, `local`, has none."""
    try:
        snapshot = pull(Address(publish.repo, publish.subfolder))
    except UserError as error:
        raise type(error)(
            f"{local} has no trained model, and {error}; "
            f"train it: accelerate launch src/sft.py {name}"
        ) from None
    said = f"{local} has no trained model; taken from the Hub: {snapshot.address}"
    print(printable(said), file=sys.stderr)
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
    name = recipe.model.name or ""
    if not name.startswith(PREFIX):
        return recipe
    requested, begun = parse_address(name), output_folder(recipe) / "recipe.yaml"
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
