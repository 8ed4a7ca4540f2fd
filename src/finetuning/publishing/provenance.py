"""What a checkpoint was made of, for its manifest."""

from pathlib import Path
from typing import Any

from finetuning.data.sources import is_local
from finetuning.errors import UserError
from finetuning.hub.address import PREFIX, parse_address
from finetuning.hub.manifest import MADE_BY, NAME, Manifest, parse_manifest
from finetuning.recipe.recipe import Recipe
from finetuning.runs.folder import differences, read_environment, read_metrics

# Where a run ran and what it wrote where: no part of what was trained.
ELSEWHERE = (
    "publish",
    "generation",
    "training.output_dir",
    "training.report_to",
    "training.run_name",
)


def describe(folder: Path, recipe: Recipe, kind: str) -> Manifest:
    """What a run folder's checkpoint was made of; the files are added when they are known.

    `kind` is full, adapter or merged; the recipe is the one that is published.
    """
    environment, sources = read_environment(folder), recipe.data.sources
    launches = environment.get("launches") or [{}]
    data = {
        "path": [source.path for source in sources],
        "datasets": sorted({source.path for source in sources if not is_local(source)}),
        "fingerprint": environment.get("data"),
    }
    return {
        "made_by": MADE_BY,
        "kind": kind,
        "base": base_of(recipe),
        "data": data,
        "losses": held_out_losses(read_metrics(folder)),
        "git": environment.get("git"),
        "python": environment.get("python"),
        "versions": environment.get("versions", {}),
        "processes": launches[-1].get("processes"),
        "started": launches[0].get("started"),
        "finished": environment.get("finished"),
        "recipe": recipe.resolved(),
        "files": {},
    }


def base_of(recipe: Recipe) -> dict[str, str | None] | None:
    """{name, subfolder, revision} of the base model on the Hub; name is None for a local one, None from scratch."""
    name = recipe.model.name
    if name is None:
        return None
    if name.startswith(PREFIX):
        return dict(zip(("name", "subfolder", "revision"), parse_address(name), strict=True))
    is_named = not name.startswith(
        "./"
    )  # as publication.portable writes a folder that others do not have
    return {
        "name": name if is_named else None,
        "subfolder": None,
        "revision": recipe.model.revision,
    }


def held_out_losses(metrics: list[dict[str, Any]]) -> dict[str, float] | None:
    """{before, after} training, of the examples that were held out."""
    losses = [entry["eval_loss"] for entry in metrics if "eval_loss" in entry]
    return {"before": losses[0], "after": losses[-1]} if losses else None


def changed_settings(before: Manifest, now: Manifest) -> list[str]:
    """`setting was x, is y` for every setting that decides what is trained."""
    return [
        f"{name} was {old!r}, is {new!r}"
        for name, old, new in differences(before["recipe"], now["recipe"])
        if not any(name == other or name.startswith(f"{other}.") for other in ELSEWHERE)
    ]


def unlike_published(recipe: Path, data: str, versions: dict[str, str]) -> list[str]:
    """Why a run of a pulled recipe may not end as the published one did: data and versions that differ.

    Nothing for a recipe that has no manifest beside it. `data` is the fingerprint of the examples.
    """
    file = recipe.with_name(NAME)
    if not file.is_file():
        return []
    manifest = parse_manifest(file.read_bytes())
    if manifest is None:
        raise UserError(
            f"{file} is no manifest of a published checkpoint; move the recipe to a folder of its own"
        )
    found = []
    if manifest["data"]["fingerprint"] not in (None, data):
        found.append("the data is not the same: other rows, or another tokenizer")
    for name, before in manifest["versions"].items():
        if versions.get(name) != before:
            found.append(f"{name} was {before}, is {versions.get(name, 'not installed')}")
    return found
