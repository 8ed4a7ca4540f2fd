"""The recipe as others can run it: nothing in it is a path of this machine."""

import os
from pathlib import Path

from finetuning.data.section import Data, Source
from finetuning.data.sources import is_local, looks_local
from finetuning.errors import UserError
from finetuning.hub.address import PREFIX
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Model, Publish


def publish_section(recipe: Recipe) -> Publish:
    """Where and how the recipe is published. Raises UserError if it does not say."""
    if recipe.publish is None:
        raise UserError(
            "the recipe has no publish section; "
            "add publish.repo=owner/name publish.subfolder=folder/name"
        )
    return recipe.publish


def portable_recipe(recipe: Recipe, base_commit: str | None) -> Recipe:
    """The base model by Hub id and commit, data and output by paths that others can have.

    `base_commit` is the commit of a base model of the Hub when it was trained on. Raises UserError
    where publish.base_model or publish.data is given and what it names is not local.
    """
    publish = publish_section(recipe)
    output = f"outputs/{Path(recipe.training.output_dir).name}"
    return recipe.model_copy(
        update={
            "model": portable_model(recipe.model, publish.base_model, base_commit),
            "data": recipe.data.model_copy(
                update={
                    "path": portable_sources(recipe.data, publish.data),
                    "chat_template": portable_template(recipe.data.chat_template),
                }
            ),
            "training": recipe.training.model_copy(update={"output_dir": output}),
            "publish": publish.model_copy(update={"base_model": None, "data": None}),
        }
    )


def portable_model(model: Model, base_model: str | None, base_commit: str | None) -> Model:
    """The model section with `./name` for a local folder, or the Hub id that it is a copy of."""
    name = model.name
    if model.adapter and not model.adapter.startswith(PREFIX):
        model = model.model_copy(update={"adapter": f"./{Path(model.adapter).name}"})
    is_folder = name is not None and not name.startswith(PREFIX) and base_commit is None
    if base_model and not is_folder:
        raise UserError(
            "publish.base_model names the Hub id of which a local folder is a copy; "
            f"model.name is {name or 'not given'}"
        )
    if base_model:
        name, _, revision = base_model.partition("@")
        return model.model_copy(update={"name": name, "revision": revision or model.revision})
    if name is not None and is_folder:
        name = f"./{Path(name).name}"
    return model.model_copy(update={"name": name, "revision": base_commit or model.revision})


def portable_sources(data: Data, hub_id: str | None = None) -> str | list[Source]:
    """The data's paths, or the Hub id of the data set that its one local path is a copy of."""
    if hub_id:
        if not isinstance(data.path, str) or not is_local(data.sources[0]):
            raise UserError(
                "publish.data names the Hub id of which one local file or folder is a copy; "
                f"data.path is {data.path if isinstance(data.path, str) else 'a list'}"
            )
        return hub_id
    if isinstance(data.path, str):
        return portable_path(data.sources[0])
    # An entry may leave the reader, say, to the data section; whether it is local depends on both.
    entries = zip(data.path, data.sources, strict=True)
    return [entry.model_copy(update={"path": portable_path(source)}) for entry, source in entries]


def portable_template(name: str | None) -> str | None:
    """The name of a chat template, or `./` and the name of its file, which the tokenizer has."""
    is_path = name is not None and ("/" in name or Path(name).is_file())
    return f"./{Path(name).name}" if name is not None and is_path else name


def portable_path(source: Source) -> str:
    """A data set's Hub id or a file below the project's folder as it is, else `./` and its name."""
    path = Path(os.path.normpath(source.path))  # a/../../b leaves the folder too
    is_inside = not path.is_absolute() and not str(path).startswith(("~", ".."))
    if not is_local(source) or (is_inside and looks_local(source.path)):
        return source.path if not is_local(source) else f"{path}"
    return f"./{path.name}"
