"""The longest batch first: what does not fit into memory shows in the first minute, and not after
hours.

It is computed once, forward and backward, beside as much memory as the optimizer and added-up
gradients will take. What it leaves is thrown away and the random numbers are put back, so that
training is the same, bit for bit.
"""

import contextlib

import torch
from accelerate.utils import DistributedType

from finetuning.budget.savings import remedies
from finetuning.data.collator import Batch
from finetuning.errors import UserError, is_out_of_memory
from finetuning.launch.step_size import smaller
from finetuning.model.packing import Packing, packed_as
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.trainer import ResponseTrainer


class TooLarge(Exception):
    """The longest micro-batch does not fit, and the recipe lets it be made smaller
    (training.auto_find_batch_size).
    """


def check_memory(trainer: ResponseTrainer, run: PreparedRun) -> None:
    """Computes the longest micro-batch of the whole run. Raises UserError where it does not fit, or
    TooLarge.
    """
    args, recipe = trainer.args, run.recipe
    batch = longest_batch(trainer, is_padded=recipe.data.layout == "padded")
    fits_here = fits(trainer, batch)
    # All processes continue, or none does.
    if all(trainer.accelerator.gather(torch.tensor([int(fits_here)], device=args.device)).tolist()):
        return
    examples, tokens = len(batch["lengths"]), batch["input_ids"].numel()
    if recipe.training.auto_find_batch_size and args.per_device_train_batch_size > 1:
        raise TooLarge
    advice = remedies(recipe, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    raise UserError(
        f"out of memory on the longest micro-batch ({examples} examples, {tokens:,} tokens), "
        "before the first step; "
        f"smaller with {', or '.join(advice)}"
    )


def longest_batch(trainer: ResponseTrainer, is_padded: bool) -> Batch:
    loader = trainer.get_train_dataloader()
    micro_batches = trainer.state.max_steps * trainer.args.gradient_accumulation_steps
    numbers = loader.batch_sampler.longest(micro_batches, is_padded)
    examples = [trainer.train_dataset[number] for number in numbers]
    batch: Batch = trainer.data_collator(examples)
    return batch


def fits(trainer: ResponseTrainer, batch: Batch) -> bool:
    """Whether the batch fits. Leaves no trace."""
    device = trainer.args.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            compute(trainer, batch)
            fits = True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
    trainer.model_wrapped.zero_grad()
    trainer.throughput.reset()
    trainer.first_non_finite.forget()
    if not fits and device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def compute(trainer: ResponseTrainer, batch: Batch) -> None:
    """Forward and backward, without communication with other processes where that can be."""
    model, kind = trainer.model_wrapped, trainer.accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        # Whose backward cannot be taken back; its optimizer has all the memory it needs.
        inputs = trainer._prepare_inputs(batch)
        model.train()
        with packed_as(Packing.of(inputs)), trainer.compute_loss_context_manager():
            trainer.compute_loss(model, inputs)
        return
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    has_state = bool(trainer.optimizer.state)
    held = [
        torch.empty_like(weight)
        for weight in trained
        for _ in range(optimizer_slots(trainer.args.optim, has_state))
    ]
    if trainer.args.gradient_accumulation_steps > 1:
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
    is_alone = kind != DistributedType.FSDP
    with trainer.accelerator.no_sync(model) if is_alone else contextlib.nullcontext():
        trainer.training_step(model, batch, trainer.items_of([batch]).clamp(min=1))
    del held


def optimizer_slots(optim: str, has_state: bool) -> int:
    """How many numbers the optimizer has yet to keep for each trained one."""
    return 2 if optim.startswith("adamw_torch") and not has_state else 0


def halve_micro_batch(trainer: ResponseTrainer) -> None:
    """Halves the micro-batch (an odd one is divided by more) and makes up for it by
    accumulation."""
    args = trainer.args
    size = args.per_device_train_batch_size
    args.per_device_train_batch_size, args.gradient_accumulation_steps = smaller(
        size, args.gradient_accumulation_steps
    )
    trainer._train_batch_size = args.train_batch_size
    # What train() wrapped, it wraps again.
    trainer.model = trainer.model_wrapped = trainer.accelerator.unwrap_model(
        trainer.model_wrapped, keep_fp32_wrapper=False
    )
    trainer.optimizer = trainer.lr_scheduler = None  # type: ignore[assignment]
    if trainer.is_world_process_zero():
        print(
            f"out of memory with micro-batches of {size} examples: now "
            f"{args.per_device_train_batch_size}, "
            f"{args.gradient_accumulation_steps} of them in a step"
        )
