"""Which settings need less memory, and which of them are enough."""

from collections.abc import Callable
from typing import NamedTuple

from finetuning.launch.step_size import smaller
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Lora


class Saving(NamedTuple):
    """A setting that needs less memory."""

    setting: str
    """as it is written on the command line, or as a sentence"""
    recipe: Recipe | None
    """the recipe with it; None where it takes a number that only its author can choose"""


def savings(recipe: Recipe, micro_batch: int, accumulation: int) -> list[Saving]:
    """Those that change the least of the training first; half the micro-batch, a quarter, ..."""
    found = []
    if recipe.data.batch_tokens:
        found.append(Saving(f"a data.batch_tokens below {recipe.data.batch_tokens}", None))
    while not recipe.data.batch_tokens and micro_batch > 1:
        micro_batch, accumulation = smaller(micro_batch, accumulation)
        found.append(with_micro_batch(recipe, micro_batch, accumulation))
    if not recipe.training.activation_checkpointing:
        training = recipe.training.model_copy(update={"activation_checkpointing": True})
        changed = recipe.model_copy(update={"training": training})
        found.append(Saving("training.activation_checkpointing=true", changed))
    if recipe.lora and recipe.model.quantization != "4bit" and not recipe.model.from_scratch:
        bits = "4bit" if recipe.model.quantization else "8bit"
        model = recipe.model.model_copy(update={"quantization": bits})
        changed = recipe.model_copy(update={"model": model})
        found.append(Saving(f"model.quantization={bits}", changed))
    found.append(Saving(f"a data.max_length below {recipe.data.max_length}", None))
    return found if recipe.lora else [*found, *with_adapter(recipe)]


def with_adapter(recipe: Recipe) -> list[Saving]:
    """An adapter on every linear layer, and one on a base in 4 bits."""
    changed = recipe.model_copy(update={"lora": Lora(r=8, target_modules="all-linear")})
    found = [Saving("a lora section", changed)]
    if not recipe.model.from_scratch:
        model = recipe.model.model_copy(update={"quantization": "4bit"})
        changed = changed.model_copy(update={"model": model})
        found.append(Saving("a lora section with model.quantization=4bit", changed))
    return found


def with_micro_batch(recipe: Recipe, micro_batch: int, accumulation: int) -> Saving:
    setting = f"training.per_device_train_batch_size={micro_batch}"
    update = {"per_device_train_batch_size": micro_batch}
    if not recipe.training.global_batch_size:  # accumulation follows from it
        setting += f" training.gradient_accumulation_steps={accumulation}"
        update["gradient_accumulation_steps"] = accumulation
    training = recipe.training.model_copy(update=update)
    return Saving(setting, recipe.model_copy(update={"training": training}))


def remedies(recipe: Recipe, micro_batch: int, accumulation: int) -> list[str]:
    """What to try where memory ended: of the micro-batches only the next smaller one."""
    found = savings(recipe, micro_batch, accumulation)
    batches = [saving for saving in found if "per_device_train_batch_size" in saving.setting]
    return [saving.setting for saving in found if saving not in batches[1:]]


def enough(
    recipe: Recipe,
    micro_batch: int,
    accumulation: int,
    fits: Callable[[Recipe], bool],
    fits_without_tokens: bool = True,
) -> list[str]:
    """The settings of which each is enough by itself, as `fits` estimates, if any is.

    Of the micro-batches the largest that fits, and of the adapters the larger. Fewer tokens are
    enough only if what does not depend on their number fits.
    """
    found: list[str] = []
    for setting, changed in savings(recipe, micro_batch, accumulation):
        is_batch = "per_device_train_batch_size" in setting
        if is_batch and any("per_device_train_batch_size" in other for other in found):
            continue
        if setting.startswith("a lora") and any(other.startswith("a lora") for other in found):
            continue
        if fits_without_tokens if changed is None else fits(changed):
            found.append(setting)
    return found
