"""Which trained model a name means: a run folder, a recipe's run folder, else what it published."""

import re
import sys
from pathlib import Path

from finetuning.errors import UserError
from finetuning.hub.address import PREFIX, Address, parse_address
from finetuning.hub.allowed_files import ADAPTER_WEIGHTS
from finetuning.hub.download import pull
from finetuning.hub.snapshot import Snapshot
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.recipe.sections import Model, Publish
from finetuning.runs.checkpoints import (
    checkpoints_of,
    damage_of,
    size_damage,
    verify_newest_first,
)
from finetuning.runs.folder import has_model
from finetuning.runs.lookup import find_run_folder, means_folder
from finetuning.runs.output_folder import output_folder
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
            folder = pull_published(recipe, recipe.publish, name)
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


def pull_published(recipe: Recipe, publish: Publish, name: str) -> Path:
    """The published model of the recipe of that name, whose run folder has none."""
    local = output_folder(recipe)
    try:
        snapshot = pull(Address(publish.repo, publish.subfolder))
    except UserError as error:
        raise type(error)(
            f"{local} has no trained model, and {error}; "
            f"train it: accelerate launch {recipe.script} {name}"
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
    """The recipe with its base model pulled and pinned to a commit, if published from here."""
    name = recipe.model.name or ""
    if not name.startswith(PREFIX):
        return recipe
    snapshot = pull_pinned(name, begun_model(recipe).name)
    if (snapshot.folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"model.name: {snapshot.address} is an adapter, which cannot carry another; give its "
            "base model"
        )
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"name": str(snapshot.address)})}
    )


def pull_pinned(name: str, begun: str | None) -> Snapshot:
    """The published model of that address.

    Without a revision: of the newest commit, or for a run that is resumed of the one it began with,
    since every publication to the repository makes a new one.
    """
    requested = parse_address(name)
    if requested.revision is None and (begun or "").startswith(f"{requested}@"):
        requested = parse_address(str(begun))
    return pull(requested)


def begun_model(recipe: Recipe) -> Model:
    """The model section of a run that is resumed; that of the recipe where none was begun."""
    begun = output_folder(recipe) / "recipe.yaml"
    return load_recipe(begun).model if begun.is_file() else recipe.model


def with_begun_adapter(recipe: Recipe) -> Recipe:
    """Where model.name is an adapter: the recipe with its base model there, the adapter as
    model.adapter, and its shape as the lora section.

    Raises UserError where the adapter is not whole or does not say what it is on.
    """
    name = recipe.model.adapter or recipe.model.name
    if name is None:
        return recipe
    if name.startswith(PREFIX):
        snapshot = pull_pinned(name, begun_model(recipe).adapter or begun_model(recipe).name)
        folder, name = snapshot.folder, str(snapshot.address)
    else:
        folder = Path(name).expanduser()
    if (folder / "recipe.yaml").is_file() and not has_model(folder):
        file = folder / "recipe.yaml"
        raise UserError(
            f"model.name: {folder} has no trained model; train it first: accelerate launch "
            f"{load_recipe(file).script} {file}"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if recipe.model.adapter:
            raise UserError(f"model.adapter: {folder} has no {ADAPTER_WEIGHTS}")
        return recipe
    return on_adapter(recipe, folder, name)


def on_adapter(recipe: Recipe, folder: Path, name: str) -> Recipe:
    if damage := size_damage(folder):
        raise UserError(f"model.name: {folder}: {damage}")
    places = (folder / "recipe.yaml", folder.parent / "recipe.yaml")  # of a checkpoint
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(
            f"model.name: {folder} is an adapter without the recipe.yaml of its run, which "
            "names its base model"
        )
    before = load_recipe(file)
    if before.model.from_scratch or before.lora is None:
        raise UserError(f"model.name: {folder} is an adapter on random weights; train its base")
    wanted = recipe.lora.model_dump(exclude_unset=True) if recipe.lora else {}
    for field, value in wanted.items():
        if (is_now := getattr(before.lora, field)) != value:
            raise UserError(
                f"lora.{field} is {value}, of the adapter {folder} it is {is_now}; leave the lora "
                "section out, or train a new adapter on full weights"
            )
    base = recipe.model if recipe.model.adapter else before.model
    given = {"dtype", "quantization"} & recipe.model.model_fields_set
    changes = {**{field: getattr(recipe.model, field) for field in given}, "adapter": name}
    settings = {
        **recipe.resolved(),
        "model": {**base.model_dump(), **changes},
        "lora": before.lora.model_dump(exclude_unset=True),
    }
    return type(recipe).model_validate(settings)
