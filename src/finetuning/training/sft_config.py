"""Recipe -> trl.SFTConfig: the training section, with what other sections and the machine
decide."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from finetuning.errors import UserError, one_line
from finetuning.launch.devices import require_kernels, uses_gpu
from finetuning.launch.step_size import step_size
from finetuning.launch.strategy import is_set
from finetuning.model.precision import precision
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import NOT_OF_SFT_CONFIG


def make_arguments(recipe: Recipe, has_eval: bool) -> SFTConfig:
    """The training section as SFTConfig, with what other sections decide."""
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        # It compiles with ninja, which pip puts beside this Python: not on the PATH unless the
        # environment is active.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = recipe.training.model_dump(exclude_unset=True, exclude=NOT_OF_SFT_CONFIG)
    # trl's default of recomputing every activation costs a third of the speed; a recipe asks for it
    # where it must.
    settings["activation_checkpointing"] = bool(settings.get("activation_checkpointing"))
    # Every parameter is used; looking costs a walk over the graph in every step.
    settings.setdefault("ddp_find_unused_parameters", False)
    settings["learning_rate"] = recipe.training.learning_rate
    settings["logging_nan_inf_filter"] = recipe.training.logging_nan_inf_filter
    # The loss before training: the summary and the card compare with it.
    settings["eval_on_start"] = has_eval
    settings |= best_metric(recipe)
    settings |= of_step(recipe)
    settings |= of_device(recipe, settings)
    try:
        args = SFTConfig(**settings)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"training: {one_line(error)}") from None
    # A process has one GPU; of more that it sees Trainer would make a DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def of_step(recipe: Recipe) -> dict[str, Any]:
    """How many examples this process computes at once, and how often before a step."""
    step = step_size(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    evaluated = recipe.training.per_device_eval_batch_size
    return {
        "per_device_train_batch_size": step.micro_batch,
        "gradient_accumulation_steps": step.accumulation,
        "per_device_eval_batch_size": evaluated or step.micro_batch,
    }


def of_device(recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """The device, and the format it computes in."""
    on_gpu = uses_gpu(recipe)
    if on_gpu:
        require_kernels()
    capability = torch.cuda.get_device_capability() if on_gpu else None
    device = torch.device("cuda" if on_gpu else "cpu")
    return {
        **precision(recipe, device, capability),
        # Two gloo processes find each other only with this flag, and with ACCELERATE_USE_CPU alone
        # Trainer would put the model of one process on the GPU.
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": settings.get("dataloader_pin_memory", on_gpu),
    }


def best_metric(recipe: Recipe) -> dict[str, Any]:
    """What early stopping and load_best_model_at_end go by.

    transformers takes the loss only with load_best_model_at_end, and of all but losses the highest
    for the best: of perplexity too.
    """
    training = recipe.training
    metric = training.metric_for_best_model
    if metric is None and training.early_stopping_patience:
        metric = "loss"
    if metric is None:
        return {}
    is_higher_better = training.greater_is_better
    if is_higher_better is None:
        is_higher_better = not metric.endswith(("loss", "perplexity"))
    return {"metric_for_best_model": metric, "greater_is_better": is_higher_better}
