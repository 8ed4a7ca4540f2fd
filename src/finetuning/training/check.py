"""What --check looks at after recipe, data and run folder, without training."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.budget.budget import existing
from finetuning.errors import UserError
from finetuning.launch.devices import GIB
from finetuning.model.weight_files import require_weight_files
from finetuning.recipe.recipe import Recipe
from finetuning.training.argument_checks import trial_arguments
from finetuning.training.library_checks import require_library_settings
from finetuning.training.prepared_run import PreparedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAM_STATE = 8  # bytes of two float32 averages for each trained weight


def check(run: PreparedRun, folder: Path) -> list[str]:
    """What was not looked at, a line each.

    Raises UserError for what would end the run in its first minutes, or at its first checkpoint.
    """
    model = require_library_settings(run, trial_arguments(run.recipe))
    is_local = require_weight_files(run.recipe.model)
    require_disk(run.recipe, model, folder)
    unseen = ["whether it fits into memory: src/preview.py says so, with --gpu for another machine"]
    if run.recipe.model.name and not is_local:
        unseen.append(f"the weights of {run.recipe.model.name}, which are on the Hub")
    if run.recipe.model.quantization:
        unseen.append("whether bitsandbytes runs on the GPU of the job")
    return unseen


def require_disk(recipe: Recipe, model: "PreTrainedModel", folder: Path) -> None:
    """Raises UserError where not even the final weights and one checkpoint would fit."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    weights = sum(weight.numel() * weight.element_size() for weight in trained)
    state = ADAM_STATE * sum(weight.numel() for weight in trained)
    needed = weights + (weights + state if recipe.training.save_strategy != "no" else 0)
    free = shutil.disk_usage(existing(folder)).free
    if needed > free:
        raise UserError(
            f"training.output_dir: {existing(folder)} has {free / GIB:.1f} GiB free; the weights "
            "and one "
            f"checkpoint need {needed / GIB:.1f}"
        )
