"""Combinations that fail, or silently train something else: refused before a model is loaded.

`python -m finetuning.launch.compatibility` prints them as a table; docs/limits.md has it in both
languages. What contradicts itself in the file alone is refused by recipe.py when it is read, with
the line where it stands; what only a library, the model or the rows can tell, behind these.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.launch.launcher import names_config
from finetuning.launch.strategy import Strategy, is_set
from finetuning.recipe.recipe import Recipe


@dataclass(frozen=True)
class Rule:
    what: str
    """the combination, as the recipe and the accelerate config name it"""
    why: str
    instead: str
    """the nearest thing that works"""
    is_met: Callable[[Recipe, Strategy], bool]
    depends_on_machine: bool = False
    """asked only where it is trained, not by --check and preview, which may run elsewhere"""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def deepspeed_file() -> dict[str, Any]:
    """DeepSpeed's own settings, where an accelerate config names a file of them."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    settings: dict[str, Any] = json.loads(Path(file).read_text("utf-8")) if file else {}
    return settings


def gathers_on_save(strategy: Strategy) -> bool:
    zero = deepspeed_file().get("zero_optimization")
    if zero is not None:
        return bool(zero.get("stage3_gather_16bit_weights_on_model_save"))
    return is_set("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")


def is_for_gpus(recipe: Recipe, strategy: Strategy) -> bool:
    """Whether the processes were started for GPUs, and nothing says that the CPU is meant."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    hides_gpus = all(number.strip() in ("", "-1") for number in visible)
    if recipe.training.use_cpu or is_set("ACCELERATE_USE_CPU") or hides_gpus:
        return False
    return strategy.name != "single" or names_config()


RULES = (
    Rule(
        "FSDP on a CPU",
        "accelerate silently runs it as plain DDP",
        "accelerate_configs/cpu_ddp.yaml, or zero3.yaml with training.use_cpu: true",
        lambda recipe, strategy: strategy.name == "fsdp" and not has_gpu(),
        depends_on_machine=True,
    ),
    Rule(
        "an accelerate config for GPUs without a usable GPU",
        "it would silently train on the CPU",
        "training.use_cpu: true, or accelerate_configs/cpu.yaml or cpu_ddp.yaml; where there is a "
        "GPU, `python -c 'import torch; torch.cuda.init()'` says what is wrong, such as a driver "
        "older than torch's CUDA",
        lambda recipe, strategy: is_for_gpus(recipe, strategy) and not has_gpu(),
        depends_on_machine=True,
    ),
    Rule(
        "FSDP version 1",
        "its flat parameters cannot be told apart: neither the output layer's weight nor frozen "
        "ones",
        "accelerate_configs/fsdp2.yaml",
        lambda recipe, strategy: (
            strategy.name == "fsdp" and os.environ.get("FSDP_VERSION", "1") != "2"
        ),
    ),
    Rule(
        "ZeRO with ACCELERATE_USE_CPU=true",
        "accelerate silently runs it as plain DDP",
        "leave the variable out; training.use_cpu: true keeps GPUs idle",
        lambda recipe, strategy: strategy.name.startswith("zero") and is_set("ACCELERATE_USE_CPU"),
    ),
    Rule(
        "ZeRO stage 0",
        "it shards nothing and saves like ZeRO all the same",
        "accelerate_configs/ddp.yaml",
        lambda recipe, strategy: strategy.name == "zero0",
    ),
    Rule(
        "ZeRO-3 that does not gather weights on saving",
        "the run folder would hold no weights that from_pretrained reads",
        "zero3_save_16bit_model: true, as in accelerate_configs/zero3.yaml",
        lambda recipe, strategy: strategy.name == "zero3" and not gathers_on_save(strategy),
    ),
    Rule(
        "ZeRO with an optimizer or scheduler in DeepSpeed's file",
        "training.optim and training.lr_scheduler_type own them, and the logged rate would be that "
        "of the next step",
        "leave both out of the file",
        lambda recipe, strategy: (
            strategy.name.startswith("zero")
            and bool({"optimizer", "scheduler"} & deepspeed_file().keys())
        ),
    ),
    Rule(
        "model.quantization with ZeRO-3 or FSDP",
        "bitsandbytes' weights cannot be sharded",
        "accelerate_configs/ddp.yaml, or zero2.yaml: each process holds the small base model",
        lambda recipe, strategy: bool(recipe.model.quantization) and strategy.is_sharded,
    ),
    Rule(
        "training.auto_find_batch_size with ZeRO or FSDP",
        "a wrapped model cannot be rebuilt with another micro-batch",
        "a smaller training.per_device_train_batch_size, with training.global_batch_size",
        lambda recipe, strategy: (
            recipe.training.auto_find_batch_size and strategy.name not in ("single", "ddp")
        ),
    ),
    Rule(
        "training.loraplus_lr_ratio with ZeRO or FSDP",
        "it was not tested with an optimizer whose state is shared out",
        "accelerate_configs/ddp.yaml",
        lambda recipe, strategy: (
            recipe.training.loraplus_lr_ratio is not None and strategy.name not in ("single", "ddp")
        ),
    ),
    Rule(
        "ZeRO offload without a C++ compiler",
        "DeepSpeed compiles its Adam for the CPU when training begins",
        "install g++, or accelerate_configs/zero3.yaml",
        lambda recipe, strategy: (
            strategy.name.startswith("zero") and strategy.offload and not shutil.which("g++")
        ),
        depends_on_machine=True,
    ),
    Rule(
        "model.dtype: float16 with training",
        "the gradient scaler refuses gradients of half-precision weights",
        "model.dtype: float32 with training.fp16: true",
        lambda recipe, strategy: recipe.model.dtype == "float16" and recipe.lora is None,
    ),
    Rule(
        "model.dtype: bfloat16 with training.fp16",
        "GPUs that need fp16 have no bf16 kernels, and the gradient scaler does not scale bf16",
        "model.dtype: float32 with training.fp16: true",
        lambda recipe, strategy: recipe.model.dtype == "bfloat16" and bool(recipe.training.fp16),
    ),
    Rule(
        "training.load_best_model_at_end without data.eval",
        "there is no loss to choose by",
        "data.eval: {every: 50} with training.eval_strategy: steps",
        lambda recipe, strategy: (
            bool(recipe.training.load_best_model_at_end) and recipe.data.eval is None
        ),
    ),
    Rule(
        "training.load_best_model_at_end with fewer saves than evaluations",
        "the best step would have no checkpoint",
        "training.save_steps equal to training.eval_steps, or training.save_strategy: best",
        lambda recipe, strategy: (
            bool(recipe.training.load_best_model_at_end) and skips_saves(recipe.training)
        ),
    ),
    Rule(
        "training.bf16 with training.fp16",
        "a run computes in one of them",
        "training.bf16 on a GPU of compute capability 8.0 or higher, training.fp16 on an older one",
        lambda recipe, strategy: bool(recipe.training.bf16 and recipe.training.fp16),
    ),
    Rule(
        "training.activation_checkpointing_kwargs without training.activation_checkpointing",
        "they have no effect",
        "training.activation_checkpointing: true, or leave them out",
        lambda recipe, strategy: (
            bool(recipe.training.activation_checkpointing_kwargs)
            and not recipe.training.activation_checkpointing
        ),
    ),
    Rule(
        "training.activation_offloading on a CPU",
        "activations are in main memory already",
        "training.activation_checkpointing: true, or leave it out",
        lambda recipe, strategy: (
            bool(recipe.training.activation_offloading)
            and (bool(recipe.training.use_cpu) or not has_gpu())
        ),
        depends_on_machine=True,
    ),
    Rule(
        "training.bf16_full_eval or training.fp16_full_eval",
        "neither an evaluation during training nor src/evaluate.py heeds them",
        "training.bf16 or training.fp16, in which the evaluation set is evaluated too",
        lambda recipe, strategy: bool(
            recipe.training.bf16_full_eval or recipe.training.fp16_full_eval
        ),
    ),
    Rule(
        "training.debug: underflow_overflow",
        "transformers' hooks end in an error at the first boolean mask",
        "leave it out: a run ends by itself where its loss is not finite",
        lambda recipe, strategy: "underflow_overflow" in recipe.training.debug,
    ),
    Rule(
        "training.torch_compile",
        "it was not tested with packed attention and the loss over responses",
        "leave it out",
        lambda recipe, strategy: bool(recipe.training.torch_compile),
    ),
)


def skips_saves(training: Any) -> bool:
    """Whether a step that is evaluated may not be saved, where both are done every so many
    steps."""
    by_steps = training.eval_strategy == training.save_strategy == "steps"
    return bool(by_steps and training.save_steps != (training.eval_steps or training.logging_steps))


def require_compatible(recipe: Recipe, strategy: Strategy, trains_here: bool = True) -> None:
    """Raises UserError for the first rule that recipe and strategy meet, on this machine or
    wherever it will train."""
    for rule in RULES:
        if (trains_here or not rule.depends_on_machine) and rule.is_met(recipe, strategy):
            raise UserError(f"{rule.what} does not work: {rule.why}; instead: {rule.instead}")


def table() -> str:
    """The rules as Markdown."""
    rows = [f"| {rule.what} | {rule.why} | {rule.instead} |" for rule in RULES]
    return "\n".join(["| does not work | because | instead |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
