"""What a run will need: memory of a process, steps, time and disk, without loading any weights."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from finetuning.budget.step_memory import measure_step, meta_model, optimizer_bytes
from finetuning.budget.storage_tracker import StepMemory
from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.collator import Collator
from finetuning.data.examples import IGNORE_INDEX, Example
from finetuning.data.storage import Prepared
from finetuning.launch.devices import Device
from finetuning.launch.step_size import StepSize, step_size
from finetuning.launch.strategy import Strategy
from finetuning.model.flops import matmul_params_of
from finetuning.model.loading import load_config
from finetuning.model.precision import precision, with_weight_format
from finetuning.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Shares of the device's peak FLOP/s, over a whole run: from one whose steps wait for the host, or
# unpack 8 bits, to a good one.
UTILISATION = (0.15, 0.5)
CPU_UTILISATION = (0.4, 0.95)  # of the product that was timed
# Seconds that a host takes to launch an operation of eager PyTorch, of a slow and of a fast one: a
# GPU waits for it where a micro-batch is small.
LAUNCH = (12e-6, 6e-6)
# Shares of a device's memory; CUDA's own context and gaps between tensors take the rest.
FULL, TIGHT = 0.95, 0.85
REDUCE_BUCKET = 500_000_000  # numbers; DeepSpeed's default of zero_optimization.reduce_bucket_size


@dataclass(frozen=True)
class Budget:
    """All sizes in bytes, those of memory for one process."""

    device: Device
    strategy: Strategy
    step: StepSize
    parts: dict[str, int]
    """at the moment when their sum is largest: weights, adapters, gradients, optimizer,
    activations, logits, communication"""
    longest: tuple[int, int, int]
    """of the longest micro-batch: examples, tokens computed (padding too), response tokens"""
    steps: int
    tokens: int
    """trained on in all steps, repeated ones too; without padding"""
    seconds: tuple[float, float] | None
    """at least and at most, without start and evaluation; None if the GPU's peak is unknown"""
    has_reference: bool
    """of preference tuning: examples are pairs, and the seconds have a pass of their reference"""
    disk: int
    """checkpoints that are kept, the one that is being written, and the final weights"""
    free: int
    """on the disk of training.output_dir"""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def available(self) -> int:
        """To one process: a GPU is its own, a CPU's memory is shared by all."""
        return self.device.memory // (1 if self.device.is_gpu else self.strategy.processes)

    @property
    def fits_without_tokens(self) -> bool:
        """Whether what is there at the peak beside activations and logits fits."""
        of_tokens = self.parts["activations"] + self.parts["logits"]
        return self.total - of_tokens <= TIGHT * self.available

    @property
    def verdict(self) -> str:
        """fits, tight, or does not fit."""
        share = self.total / self.available
        return "does not fit" if share > FULL else "tight" if share > TIGHT else "fits"


def make_budget(
    recipe: Recipe,
    prepared: Prepared,
    tokenizer: "PreTrainedTokenizerFast",
    strategy: Strategy,
    device: Device,
) -> Budget:
    """Raises UserError for a model without a config, and a format that the device cannot have."""
    step = step_size(recipe, strategy.processes)
    recipe = with_accumulation(recipe, step)
    sampler = sampler_of(recipe, prepared, step)
    steps_per_epoch = math.ceil(len(sampler) / step.accumulation)
    steps = steps_of(recipe, steps_per_epoch)
    epochs = steps / steps_per_epoch

    examples = longest_examples(recipe, prepared, sampler, steps * step.accumulation)
    batch = Collator(recipe.data.layout, tokenizer.pad_token_id or 0)(examples)
    recipe, autocast = with_precision(recipe, device)
    model = meta_model(recipe, load_config(recipe.model, tokenizer))
    memory = measure_step(recipe, model, batch, autocast, device.capability)

    flops = flops_of(recipe, prepared, sampler, model, epochs) / strategy.processes
    operations = memory.operations * steps * step.accumulation
    return Budget(
        device=device,
        strategy=strategy,
        step=step,
        parts=parts_of(memory, model, strategy),
        longest=(len(examples), batch["input_ids"].numel(), len(batch["targets"])),
        steps=steps,
        tokens=round(prepared.train.lengths.sum() * epochs),
        seconds=seconds_of(flops, operations, device),
        has_reference=recipe.data.is_preference,
        disk=disk_of(recipe, model, steps, steps_per_epoch),
        free=shutil.disk_usage(existing(Path(recipe.training.output_dir).expanduser())).free,
    )


def with_accumulation(recipe: Recipe, step: StepSize) -> Recipe:
    """The recipe with the micro-batches that a step of global_batch_size has here."""
    training = recipe.training.model_copy(update={"gradient_accumulation_steps": step.accumulation})
    return recipe.model_copy(update={"training": training})


def longest_examples(
    recipe: Recipe, prepared: Prepared, sampler: BatchSampler, micro_batches: int
) -> list[Example]:
    """Those of the micro-batch with the most tokens that the run will compute."""
    is_padded = recipe.data.layout == "padded"
    numbers = np.array(sampler.longest(micro_batches, is_padded))
    return list(prepared.train.select(numbers))


def with_precision(recipe: Recipe, device: Device) -> tuple[Recipe, torch.dtype | None]:
    """(the recipe with its weights' format on the device, the format of autocast)."""
    kind = "cuda" if device.is_gpu else "cpu"
    formats = precision(recipe, torch.device(kind), device.capability)
    autocast = torch.bfloat16 if formats["bf16"] else torch.float16 if formats["fp16"] else None
    base = with_weight_format(recipe, kind, formats)
    return recipe.model_copy(update={"model": base}), autocast


def flops_of(
    recipe: Recipe,
    prepared: Prepared,
    sampler: BatchSampler,
    model: "PreTrainedModel",
    epochs: float,
) -> float:
    """Of the whole run, in all processes."""
    computed = sampler.computed_tokens(recipe.data.layout == "padded") * epochs
    responses = np.count_nonzero(prepared.train.labels != IGNORE_INDEX) * epochs
    is_checkpointed = bool(recipe.training.activation_checkpointing)
    flops = matmul_params_of(model).flops(computed, responses, is_checkpointed)
    if recipe.data.is_preference:  # the reference: a forward, a third of a step, of each pair once
        flops *= 1 + min(1.0, 1 / epochs) / 3
    return flops


def seconds_of(flops: float, operations: int, device: Device) -> tuple[float, float] | None:
    """At least and at most, of one process; None where the device's peak is unknown."""
    if not device.flops:
        return None
    slow, fast = UTILISATION if device.is_gpu else CPU_UTILISATION
    slow_launch, fast_launch = LAUNCH if device.is_gpu else (0.0, 0.0)
    least = max(flops / device.flops / fast, operations * fast_launch)
    return least, max(flops / device.flops / slow, operations * slow_launch)


def sampler_of(recipe: Recipe, prepared: Prepared, step: StepSize) -> BatchSampler:
    """That of the trainer."""
    seed = recipe.training.seed if recipe.training.data_seed is None else recipe.training.data_seed
    return BatchSampler(
        prepared.train.lengths,
        widths=prepared.train.widths,
        batch_size=step.micro_batch,
        tokens=recipe.data.batch_tokens,
        processes=step.processes,
        accumulation=step.accumulation,
        seed=None if recipe.data.order == "sequential" else seed,
        by_length=recipe.data.order == "by_length",
    )


def steps_of(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run, as Trainer counts them."""
    max_steps: int = recipe.training.max_steps
    if max_steps > 0:
        return max_steps
    return math.ceil(recipe.training.num_train_epochs * steps_per_epoch)


def parts_of(memory: StepMemory, model: "PreTrainedModel", strategy: Strategy) -> dict[str, int]:
    """What of the step one process holds, and what it needs to exchange the rest.

    DDP copies gradients into buckets. ZeRO keeps float32 copies of the trained weights, and a
    bucket for gradients that are sent; ZeRO-3 and FSDP gather a layer while another is computed.
    From their sources; measured with one process only.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    share = 1 / strategy.processes
    sharded = {
        "zero1": ("optimizer",),
        "zero2": ("optimizer", "gradients"),
        "zero3": ("optimizer", "gradients", "weights", "adapters"),
        "fsdp": ("optimizer", "gradients", "weights", "adapters"),
    }
    parts = memory.peak(dict.fromkeys(sharded.get(strategy.name, ()), share))
    communication = 0
    if strategy.name == "ddp":
        communication += sum(weight.nbytes for weight in trained)
    if strategy.name.startswith("zero"):
        parts["optimizer"] += round(4 * sum(weight.numel() for weight in trained) * share)
        communication += REDUCE_BUCKET * max(weight.element_size() for weight in trained)
    if strategy.is_sharded:
        communication += 2 * largest_layer(model)
    if strategy.offload:
        parts["optimizer"] = 0
    return {**parts, "communication": communication}


def largest_layer(model: "PreTrainedModel") -> int:
    """Bytes of the largest part that is gathered as one.

    That is a layer, or a weight outside of the layers, such as embeddings.
    """
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]
    return max([*sizes, *(weight.nbytes for weight in model.parameters())])


def disk_of(recipe: Recipe, model: "PreTrainedModel", steps: int, steps_per_epoch: int) -> int:
    """Bytes of the checkpoints that are kept, one that is being written, and the final weights."""
    training = recipe.training
    weights = [weight for weight in model.parameters() if weight.requires_grad or not recipe.lora]
    whole = sum(weight.nbytes for weight in weights)
    save_steps = training.save_steps if training.save_steps >= 1 else training.save_steps * steps
    interval = {"epoch": steps_per_epoch, "steps": save_steps}.get(training.save_strategy)
    saves = math.ceil(steps / interval) if interval else 0
    kept = min(saves, (training.save_total_limit or saves) + 1)
    return int(whole + kept * (whole + optimizer_bytes(recipe, weights)))


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
