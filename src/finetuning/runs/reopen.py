"""Opening a run folder to train: is it of this run, and can this launch resume it?"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.launch.step_size import step_size
from finetuning.launch.strategy import Strategy
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.checkpoints import RECOVER, size_damage, verify_newest_first
from finetuning.runs.environment import known_environment
from finetuning.runs.folder import has_model
from finetuning.runs.output_folder import make_folder, output_folder, require_free_or_ours

# What may change from one launch to the next: how a step is shared out, as long as the step stays
# the same; what is logged, saved and asked; how rows and batches are loaded; and what comes after
# training.
MAY_CHANGE = (
    "evaluation.",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.per_device_eval_batch_size",
    "training.output_dir",
    "training.save_total_limit",
    "training.logging_",
    "training.log_",
    "training.report_to",
    "training.run_name",
    "training.project",
    "training.disable_tqdm",
    "training.dataloader_",
    "training.ddp_timeout",
    "data.num_proc",
    "generation",
    "publish",
)
# And these, unless they decide which weights are the best, or when the learning rate falls.
WHEN = ("training.save_s", "training.eval_s", "training.eval_delay")
LENGTH = ("training.num_train_epochs", "training.max_steps")
# Schedules whose rate at a step does not depend on how many steps there will be.
WITHOUT_END = ("constant", "constant_with_warmup", "reduce_lr_on_plateau", "greedy")


def with_real_folder(recipe: Recipe, file: Path) -> Recipe:
    """The recipe of a run folder that was moved or renamed, with the folder where it is now."""
    folder = file.parent
    is_of_run = file.name == "recipe.yaml" and (folder / "environment.json").exists()
    if not is_of_run or same(str(folder), recipe.training.output_dir):
        return recipe
    if output_folder(recipe).exists() or not same(
        load_recipe(file).training.output_dir, recipe.training.output_dir
    ):
        return recipe  # another folder is meant
    say(f"the run folder was moved: training.output_dir is {folder}")
    training = recipe.training.model_copy(update={"output_dir": str(folder)})
    return recipe.model_copy(update={"training": training})


def with_begun_draw(recipe: Recipe) -> Recipe:
    """The recipe of a run that began before rows were drawn by group, with its evaluation set.

    A recipe that says data.eval.group_by is as it says.
    """
    now, file = recipe.data.eval, output_folder(recipe) / "recipe.yaml"
    if now is None or "group_by" in now.model_fields_set or not file.is_file():
        return recipe
    begun = load_recipe(file).data.eval
    if begun is None or begun.group_by is not None:
        return recipe
    say(f"{file.parent} began with data.eval.group_by: null, and keeps its evaluation set")
    data = recipe.data.model_copy(
        update={"eval": now.model_copy(update={"group_by": begun.group_by})}
    )
    return recipe.model_copy(update={"data": data})


def open_run_folder(recipe: Recipe, fingerprint: str, strategy: Strategy | None) -> Path:
    """Creates the folder, or finds it of the same recipe and data, ready to be resumed.

    `strategy` is None if not yet known. Raises UserError where the folder belongs to another run,
    cannot be resumed with these processes, or cannot be written.
    """
    require_free_or_ours(output_folder(recipe))
    folder = make_folder(output_folder(recipe))
    if not (folder / "recipe.yaml").exists():
        return folder
    before, environment = load_recipe(folder / "recipe.yaml"), known_environment(folder)
    remedy = "choose another folder with training.output_dir=..."
    for name, value_before, value in refused_differences(before, recipe):
        raise UserError(
            f"{folder} belongs to another run: {name} was {value_before!r}, is {value!r}; {remedy}"
        )
    if environment is None:
        what = "its record of launches is lost, and is begun anew"
        say(f"{folder / 'environment.json'} is damaged: {what}")
        return folder
    if environment.get("data") not in (None, fingerprint):
        raise UserError(f"{folder} belongs to another run: its data was not the same; {remedy}")
    if strategy and environment.get("launches") and not is_finished(folder, recipe):
        require_same_steps(folder, before, recipe, environment["launches"][-1], strategy)
    if strategy and (change := schedule_change(before, recipe)):
        say(change)
    return folder


def say(line: str) -> None:
    """On stderr, by the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def refused_differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(setting, value before, value now) of what makes another run."""
    allowed = MAY_CHANGE if chooses_by_evaluation(now) else (*MAY_CHANGE, *WHEN)
    for name, value_before, value in differences(before.resolved(), now.resolved()):
        is_longer = name in LENGTH and is_lengthened(before, now)
        # What auto means without an adapter; runs of earlier versions say it.
        is_auto = name == "model.dtype" and not now.lora and value_before == "float32"
        is_same = same(value_before, value) or (is_auto and value == "auto")
        if not (name.startswith(allowed) or is_longer or is_same):
            yield name, value_before, value


def chooses_by_evaluation(recipe: Recipe) -> bool:
    training = recipe.training
    is_by_loss = training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    stops_early = training.early_stopping_patience is not None
    return bool(training.load_best_model_at_end) or is_by_loss or stops_early


def is_lengthened(before: Recipe, now: Recipe) -> bool:
    """Whether the same run is to take more steps."""
    had, has = before.training, now.training
    if (had.max_steps > 0) != (has.max_steps > 0):
        return False
    if had.max_steps > 0:
        return bool(has.max_steps > had.max_steps)
    return bool(has.num_train_epochs > had.num_train_epochs)


def schedule_change(before: Recipe, now: Recipe) -> str | None:
    """What becomes of the learning rate of a run that is made longer, in one line."""
    if not is_lengthened(before, now):
        return None
    kind = now.training.lr_scheduler_type
    share = 0 < (now.training.warmup_steps or 0) < 1
    if kind in WITHOUT_END and not share:
        return f"training longer: the {kind} schedule has no end, so the steps before are the same"
    return (
        f"training longer: from here on the learning rate follows the {kind} schedule of the "
        "longer run; a run of that length from its start would have had other rates before"
    )


def same(before: Any, now: Any) -> bool:
    """Equal, or two names of one file or folder."""
    if isinstance(before, str) and isinstance(now, str):
        before, now = (os.path.expanduser(name) for name in (before, now))
        if os.path.exists(before) and os.path.exists(now):
            return os.path.samefile(before, now)
    return bool(before == now)


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(setting, value before, value now) of every setting that differs.

    Older recipes lack the settings that were added since: an empty one is none.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now and not (before in (None, {}) and now in (None, {})):
        yield name, before, now


def require_same_steps(
    folder: Path, before: Recipe, recipe: Recipe, launch: dict[str, Any], strategy: Strategy
) -> None:
    """Raises UserError where the steps would be others, or the optimizer cannot be read."""
    processes, name = launch["processes"], launch["strategy"]
    had, has = step_size(before, processes), step_size(recipe, strategy.processes)
    unit = "micro-batches" if recipe.data.batch_tokens else "examples"
    if unit == "micro-batches":
        had, has = replace(had, micro_batch=1), replace(has, micro_batch=1)
    if had.total != has.total:
        raise UserError(
            f"{folder} cannot be resumed: a step had {had.total} {unit} (processes x accumulation "
            f"x examples: {had}); now it has {has.total} ({has}); change "
            "training.gradient_accumulation_steps, or begin anew in another training.output_dir "
            "with training.global_batch_size"
        )
    replicated = ("single", "ddp")
    is_same = (name, processes) == (strategy.name, strategy.processes)
    if not (is_same or (name in replicated and strategy.name in replicated)):
        raise UserError(
            f"{folder} cannot be resumed: it was trained as {name} by {processes} processes, which "
            f"each hold a part of the optimizer; now it is {strategy}. Only single and ddp can "
            "change into each other; start it as it was"
        )


def is_finished(folder: Path, recipe: Recipe | None = None) -> str | None:
    """When the run was finished, or None; also where the recipe now asks for more steps.

    A finished run whose weights are damaged is not: they are written anew from its last checkpoint.
    Raises UserError where it has none.
    """
    finished = (known_environment(folder) or {}).get("finished")
    if not finished or not isinstance(finished, str):
        return None
    trained = load_recipe(folder / "recipe.yaml")
    is_longer = recipe is not None and is_lengthened(trained, recipe)
    damage = size_damage(folder) or (None if has_model(folder) else "its weights are missing")
    if not (is_longer or damage):
        return finished
    if not any(each is None for _, each in verify_newest_first(folder)):
        has = "no whole checkpoint to resume from"
        why = f"{damage}, and it has {has}" if damage else f"it has {has}"
        raise UserError(f"{folder} is finished, but {why}; {RECOVER}")
    return None


def take_changes(folder: Path, recipe: Recipe) -> None:
    """Records what a finished run's recipe may change: where it is published, what it is asked."""
    trained = load_recipe(folder / "recipe.yaml")
    if trained.resolved() != recipe.resolved():
        write_text(folder / "recipe.yaml", recipe.as_yaml())
