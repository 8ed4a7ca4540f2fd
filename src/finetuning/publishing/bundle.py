"""Run folder -> what of it travels to the Hub, as others can use it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from tqdm import tqdm

from finetuning.data.sources import is_local, looks_local
from finetuning.errors import UserError
from finetuning.hub import allowed_files as contents
from finetuning.hub.address import PREFIX, Address
from finetuning.hub.client import TIMEOUT, patiently
from finetuning.hub.manifest import NAME, Manifest, as_text
from finetuning.publishing.card import model_card
from finetuning.publishing.provenance import describe
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Model
from finetuning.runs.folder import read_environment, read_metrics
from finetuning.runs.plots import plot_losses


@dataclass(frozen=True)
class Publication:
    """What will stand in the subfolder."""

    address: Address
    manifest: Manifest
    files: dict[str, CommitOperationAdd]
    """by path in the repository"""


def address_of(recipe: Recipe) -> Address:
    """Where the recipe is published. Raises UserError if it does not say."""
    if recipe.publish is None:
        raise UserError(
            "the recipe has no publish section; add publish.repo=owner/name publish.subfolder=folder/name"
        )
    return Address(recipe.publish.repo, recipe.publish.subfolder)


def require_publishable(folder: Path, recipe: Recipe, unfinished: bool) -> None:
    """Raises UserError for a run folder that others could not use, before anything is asked of the Hub."""
    if not unfinished and not read_environment(folder).get("finished"):
        raise UserError(
            f"{folder} is not finished; the command that began it goes on with it, --unfinished publishes it as it is"
        )
    contents.require_weights(folder, contents.ADAPTER if recipe.lora else contents.MODEL)
    contents.require_no_remote_code(folder)
    if recipe.lora is None or (recipe.publish.merged and not recipe.publish.adapter):
        return
    if recipe.model.from_scratch:
        raise UserError(
            "an adapter on a base model from scratch is of no use to others; add publish.merged=true"
        )
    if portable(recipe, folder).model.name.startswith("./"):
        raise UserError(
            f"the adapter's base model is the local folder {recipe.model.name}; say what it is a copy of, "
            "publish.base_model=owner/name, or publish full weights, publish.merged=true"
        )


def portable(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as others can run it: the base model by Hub id and commit, no folders of this machine.

    Raises UserError where publish.base_model names a base that model.name does not leave open.
    """
    data, output = recipe.data, f"outputs/{Path(recipe.training.output_dir).name}"
    if isinstance(data.path, str):
        path = portable_path(data)
    else:
        entries = zip(data.path, data.sources, strict=True)
        path = [
            entry.model_copy(update={"path": portable_path(source)}) for entry, source in entries
        ]
    return recipe.model_copy(
        update={
            "model": portable_model(recipe, folder),
            "data": data.model_copy(update={"path": path}),
            "training": recipe.training.model_copy(update={"output_dir": output}),
            "publish": recipe.publish.model_copy(update={"base_model": None}),
        }
    )


def portable_model(recipe: Recipe, folder: Path) -> Model:
    name, said = recipe.model.name, recipe.publish.base_model
    commit = read_environment(folder).get("base_commit")  # of a Hub id, when it was trained on
    is_folder = name is not None and not name.startswith(PREFIX) and commit is None
    if said and not is_folder:
        raise UserError(
            f"publish.base_model says what a local folder is a copy of; model.name is {name or 'not given'}"
        )
    if said:
        name, _, commit = said.partition("@")
    elif is_folder:
        name = f"./{Path(name).name}"
    return recipe.model.model_copy(
        update={"name": name, "revision": commit or recipe.model.revision}
    )


def portable_path(source: Any) -> str:
    """A data set's Hub id or a file below the project's folder as it stands, else `./` and its name."""
    path = Path(source.path)
    is_inside = not path.is_absolute() and path.parts[:1] not in (("~",), ("..",))
    return (
        source.path
        if not is_local(source) or (is_inside and looks_local(source.path))
        else f"./{path.name}"
    )


def gather_publication(folder: Path, recipe: Recipe, merged: Path | None) -> Publication:
    """What a run folder publishes; `merged` holds its merged weights, if these are wanted."""
    address, shown = address_of(recipe), portable(recipe, folder)
    manifest = describe(folder, shown, "merged" if merged else "adapter" if recipe.lora else "full")
    found = gathered(folder, shown, manifest, merged)
    for name, source in found.items():
        contents.require_no_token(name, source)
    if plot := plot_losses(read_metrics(folder)):
        found["loss.png"] = plot
    found["README.md"] = model_card(
        address, manifest, shown, folder, has_plot="loss.png" in found
    ).encode()
    operations = hashed(
        {f"{address.subfolder}/{name}": source for name, source in sorted(found.items())}
    )
    for path, operation in operations.items():
        info, name = operation.upload_info, path.removeprefix(f"{address.subfolder}/")
        manifest["files"][name] = {"sha256": info.sha256.hex(), "size": info.size}
    operations |= hashed({f"{address.subfolder}/{NAME}": as_text(manifest).encode()})
    return Publication(address, manifest, operations)


def gathered(
    folder: Path, recipe: Recipe, manifest: Manifest, merged: Path | None
) -> dict[str, Path | bytes]:
    """{name in the subfolder: file or content} of what the run folder has; `recipe` is the one that is published."""
    found: dict[str, Path | bytes] = {"recipe.yaml": recipe.as_yaml().encode()}
    found |= contents.files_of(folder, (*contents.TOKENIZER, *contents.RUN_RECORDS))
    if manifest["kind"] != "adapter":
        found |= contents.files_of(merged or folder, contents.MODEL)
    if recipe.lora and (not merged or recipe.publish.adapter):
        beside = f"{contents.ADAPTER_FOLDER}/" if merged else ""
        found[f"{beside}{contents.ADAPTER_WEIGHTS}"] = folder / contents.ADAPTER_WEIGHTS
        found[f"{beside}adapter_config.json"] = adapter_config(folder, manifest["base"])
    return found


def adapter_config(folder: Path, base: dict[str, Any]) -> bytes:
    """peft's settings with the base model that others have: peft writes down the path it was loaded from.

    Raises UserError where the Hub does not have it.
    """
    patiently(
        lambda: HfApi().repo_info(base["name"], revision=base["revision"], timeout=TIMEOUT),
        base["name"],
    )
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base["name"], "revision": base["revision"]}
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def hashed(files: dict[str, Path | bytes]) -> dict[str, CommitOperationAdd]:
    """The files as additions to a commit, their sha256 known."""
    operations = {path: CommitOperationAdd(path, source) for path, source in files.items()}
    total = sum(operation.upload_info.size for operation in operations.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="checksums", leave=False, delay=1
    ) as bar:
        for operation in operations.values():
            bar.update(operation.upload_info.size if operation.upload_info.sha256 else 0)
    return operations
