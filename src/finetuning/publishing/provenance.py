"""What a published model was made of, for its manifest, and what differs from it."""

from pathlib import Path
from typing import Any

from finetuning.data.sources import is_local
from finetuning.errors import UserError
from finetuning.hub.address import PREFIX, parse_address
from finetuning.hub.manifest import (
    NAME,
    BaseModelSource,
    Kind,
    Losses,
    Manifest,
    TrainingData,
    parse_manifest,
)
from finetuning.recipe.recipe import Recipe, kind_of
from finetuning.runs.folder import RunFolder
from finetuning.runs.reopen import differences

# Where a run ran and what it wrote where: not part of what was trained.
NOT_TRAINED = (
    "publish",
    "generation",
    "evaluation",
    "training.output_dir",
    "training.report_to",
    "training.run_name",
)


def describe_run(run: RunFolder, recipe: Recipe, kind: Kind) -> Manifest:
    """What a run's model was made of; the files are added when they are known.

    `recipe` is the one that is published.
    """
    environment, sources = run.environment, recipe.data.sources
    launches = environment.get("launches") or [{}]
    return Manifest(
        kind=kind,
        base=base_of(recipe),
        data=TrainingData(
            path=[source.path for source in sources],
            datasets=sorted({source.path for source in sources if not is_local(source)}),
            fingerprint=environment.get("data"),
        ),
        losses=evaluation_losses(run.metrics),
        git=environment.get("git"),
        python=environment.get("python"),
        versions=environment.get("versions", {}),
        processes=launches[-1].get("processes"),
        started=launches[0].get("started"),
        finished=environment.get("finished"),
        recipe=recipe.resolved(),
        files={},
    )


def base_of(recipe: Recipe) -> BaseModelSource | None:
    """The base model of a recipe that is published; None for one from scratch."""
    name = recipe.model.name
    if name is None:
        return None
    if name.startswith(PREFIX):
        repo, subfolder, revision = parse_address(name)
        return BaseModelSource(name=repo, subfolder=subfolder, revision=revision)
    is_folder = name.startswith("./")  # as portable_model writes one that others do not have
    return BaseModelSource(
        name=None if is_folder else name, subfolder=None, revision=recipe.model.revision
    )


def evaluation_losses(metrics: list[dict[str, Any]]) -> Losses | None:
    """Losses of the evaluation set before and after training; None where there was none."""
    losses = [entry["eval_loss"] for entry in metrics if "eval_loss" in entry]
    return Losses(before=losses[0], after=losses[-1]) if losses else None


def changed_settings(before: Manifest, now: Manifest) -> list[str]:
    """`setting was x, is y` for every setting that decides what is trained."""
    return [
        f"{name} was {old!r}, is {new!r}"
        for name, old, new in differences(with_later_settings(before.recipe), now.recipe)
        if not any(name == other or name.startswith(f"{other}.") for other in NOT_TRAINED)
    ]


def with_later_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the settings that versions since then have added, at their defaults; as it is
    where this version does not read it.
    """
    try:
        return kind_of(recipe).model_validate(recipe).resolved()
    except ValueError:
        return recipe


def unlike_published(recipe: Path, data: str, versions: dict[str, str]) -> list[str]:
    """Why a run of a pulled recipe may not end as the published one did: other data, versions.

    Nothing for a recipe that has no manifest beside it. `data` is the fingerprint of the examples.
    Raises UserError where the file beside it is not a manifest of ours.
    """
    file = recipe.with_name(NAME)
    if not file.is_file():
        return []
    manifest = parse_manifest(file.read_bytes())
    if manifest is None:
        raise UserError(
            f"{file} is not a manifest of a published model; move the recipe to a folder of its own"
        )
    found = []
    if manifest.data.fingerprint not in (None, data):
        found.append("the data is not the same: other rows, or another tokenizer")
    for name, before in manifest.versions.items():
        if versions.get(name) != before:
            found.append(f"{name} was {before}, is {versions.get(name, 'not installed')}")
    return found
