"""The training section, tried on the optimizer, the schedule and the checkpointing it names."""

import copy
import inspect
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from finetuning.errors import UserError, did_you_mean
from finetuning.evaluation.scores import BETTER_IF_HIGHER
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import NOT_OF_SFT_CONFIG
from finetuning.training.library_errors import trying

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_LOSS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def trial_arguments(recipe: Recipe) -> SFTConfig:
    """The training section as the library reads it, for no device in particular.

    For --check alone: the library begins to speak to devices and other processes when it is made.
    """
    launch = ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    for name in launch:  # there are no other processes here
        os.environ.pop(name, None)
    device = {"bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "ddp_backend"}
    settings = recipe.training.model_dump(exclude_unset=True, exclude=NOT_OF_SFT_CONFIG | device)
    settings["activation_checkpointing"] = bool(recipe.training.activation_checkpointing)
    with trying("training"):
        return SFTConfig(**settings, use_cpu=True, bf16=False)


def require_optimizer(args: SFTConfig, model: "PreTrainedModel") -> None:
    name = OptimizerNames(args.optim).value
    with trying(f"training.optim: {name}"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim_args:
            plain = replace_argument(args, "optim_args", None)
            if Trainer.get_optimizer_cls_and_kwargs(plain, model)[1] == settings:
                raise UserError(
                    f"training.optim_args: {args.optim_args} changes nothing about {name}; leave "
                    "it out"
                )
        if not kind.__module__.startswith("bitsandbytes"):  # theirs may need a GPU to be made
            groups = settings.pop("params", None)
            for key in ("optimizer_dict", "model"):  # of layers, made one by one
                if key in settings:
                    return
            kind(groups or torch.nn.Linear(2, 2).parameters(), **settings)


def replace_argument(args: SFTConfig, name: str, value: Any) -> SFTConfig:
    """A copy with another value, without the library's checks, which have been made."""
    changed = copy.copy(args)
    object.__setattr__(changed, name, value)
    return changed


def require_schedule(args: SFTConfig) -> None:
    kind = SchedulerType(args.lr_scheduler_type)
    schedule_of: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    known = set(inspect.signature(schedule_of).parameters)
    given: Any = args.lr_scheduler_kwargs or {}
    if kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        known &= {"optimizer", "num_warmup_steps"}  # it is given no others
    for name in given:
        if name not in known - {"optimizer", "num_warmup_steps", "num_training_steps"}:
            hint = did_you_mean(name, known)
            raise UserError(
                f"training.lr_scheduler_kwargs: the schedule {kind.value} has no {name}{hint}"
            )
    if args.warmup_steps and "num_warmup_steps" not in known:
        raise UserError(
            f"training.warmup_steps has no effect with lr_scheduler_type: {kind.value}; use "
            "constant_with_warmup, or leave it out"
        )
    weights = torch.nn.Linear(2, 2).parameters()
    with trying(f"training.lr_scheduler_type: {kind.value}"):
        schedule = get_scheduler(kind, torch.optim.SGD(weights, lr=1.0), 0, 10, given)
        schedule.step(*[1.0] if kind in BY_LOSS else [])


def require_metric(args: SFTConfig, metrics: tuple[str, ...], questions: int | str) -> None:
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in (*metrics, *BETTER_IF_HIGHER):
        raise UserError(
            f"training.metric_for_best_model is {metric}; an evaluation has {', '.join(metrics)}, "
            f"or scores of answers: {', '.join(BETTER_IF_HIGHER)}"
            f"{did_you_mean(metric, (*metrics, *BETTER_IF_HIGHER))}"
        )
    if metric in BETTER_IF_HIGHER and not questions:
        raise UserError(
            f"training.metric_for_best_model is {metric}, a score of answers, but "
            "evaluation.questions is 0"
        )


def require_activation_checkpointing(args: SFTConfig) -> None:
    settings: Any = args.activation_checkpointing_kwargs
    if not settings:
        return
    weight = torch.ones(1, requires_grad=True)
    with trying("training.activation_checkpointing_kwargs"):
        torch.utils.checkpoint.checkpoint(
            torch.square, weight, **{"use_reentrant": False, **settings}
        ).backward()
