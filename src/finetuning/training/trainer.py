"""A trainer with our batches and our loss: what a training step computes."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl import SFTConfig

from finetuning.data.batch_sampler import BatchSampler
from finetuning.data.collator import Batch, Collator
from finetuning.data.example_set import ExampleSet
from finetuning.model.lora import loraplus_optimizer
from finetuning.model.packing import Packing, packed_as
from finetuning.model.response_head import ResponseHead, Targets
from finetuning.model.throughput import Throughput
from finetuning.training.loader import EpochLoader
from finetuning.training.resumable import Counters, ResumableTrainer
from finetuning.training.signals import worker_ignores_signals


class ResponseTrainer(ResumableTrainer):
    """transformers' trainer, where a step does only the work that the loss needs.

    Overridden because, measured: Trainer averages evaluation losses over batches, so that a token
    of a short answer weighs more than one of a long answer; accelerate repeats examples to share
    them out. Not trl.SFTTrainer: it wants a datasets.Dataset, casts adapters of quantized models to
    bfloat16 and asks the device for metrics in every micro-batch.
    """

    data_collator: Collator
    train_dataset: ExampleSet
    eval_dataset: ExampleSet | None

    answer_scores: Callable[[], dict[str, float]] | None = None
    """of the answers that the model gives now, where they decide which step is the best"""

    def __init__(
        self,
        *,
        order: str = "random",
        batch_tokens: int | None = None,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.order, self.batch_tokens = order, batch_tokens
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.head = ResponseHead(self.accelerator.unwrap_model(self.model))
        self.throughput = self.new_throughput()
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch
        self.offloading = activation_offloading(self.model, self.args)
        if self.is_fsdp_enabled and (self.args.bf16 or self.args.fp16):
            # accelerate's rounds what the model returns, here the loss, to half precision.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                torch.bfloat16 if self.args.bf16 else torch.float16,
                reduce_dtype=torch.float32,
                output_dtype=torch.float32,
            )

    def new_throughput(self) -> Throughput:
        return Throughput(self.model, self.args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.loraplus_lr_ratio and self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = loraplus_optimizer(trained, self.args, self.loraplus_lr_ratio)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    # Batches

    def get_train_dataloader(self) -> EpochLoader:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return self.load(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            tokens=self.batch_tokens,
            accumulation=self.args.gradient_accumulation_steps,
            seed=None if self.order == "sequential" else seed,
            by_length=self.order == "by_length",
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochLoader:
        assert self.eval_dataset is not None
        return self.load(self.eval_dataset, batch_size=self.args.per_device_eval_batch_size)

    def load(self, examples: ExampleSet, **settings: Any) -> EpochLoader:
        """A loader of this process's batches; accelerate does not share them out again."""
        processes, process = self.args.world_size, self.args.process_index
        lengths, widths = examples.examples.lengths, examples.examples.widths
        return EpochLoader(
            examples,
            batch_sampler=BatchSampler(
                lengths, processes=processes, process=process, widths=widths, **settings
            ),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=worker_ignores_signals,
            # Its own: the loader would draw from the random numbers of training.
            generator=torch.Generator(),
        )

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """Items of the step on all processes.

        transformers counts labels, and waits for the device to hand it the number.
        """
        items = self.items_of(batch_samples)
        if self.args.world_size == 1:
            return items
        return self.accelerator.gather(items.to(device)[None]).sum(0)

    def items_of(self, batches: list[Batch]) -> torch.Tensor:
        """() what the loss of a step is divided by: trained tokens."""
        return torch.tensor(sum(len(batch["targets"]) for batch in batches))

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """On the device.

        Without waiting: transformers copies one tensor after another to its end, pinned or not.
        """
        device = self.args.device
        return {
            name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }

    # Loss

    def training_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Until backward is done: checkpointed layers attend again.
        with self.offloading, packed_as(Packing.of(inputs)):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """() cross-entropy of the response tokens; in training, over those of the step on all
        processes.
        """
        loss = self.scored(model, inputs)
        if num_items_in_batch is None:
            mean: torch.Tensor = loss / max(1, len(inputs["targets"]))
            return mean
        # DDP and ZeRO average gradients over processes, each of which has only its own tokens.
        share: torch.Tensor = loss * (self.accelerator.num_processes / num_items_in_batch)
        return share

    def scored(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Scores.loss of the batch's targets."""
        targets = Targets(inputs["positions"], inputs["targets"], inputs.get("counts"))
        arguments = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
        with self.head.scoring(targets):
            loss: torch.Tensor = model(**arguments, use_cache=False).logits
        assert self.head.scores is not None
        self.throughput.count(inputs, self.head.scores)
        return loss

    def prediction_step(
        self, model: Any, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), packed_as(Packing.of(inputs)):
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """With the loss of every response token counted once, whatever batch it is in."""
        training, self.throughput = self.throughput, self.new_throughput()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            found = self.evaluation()
        finally:
            # Evaluating is no training time.
            training.since += time.perf_counter() - self.throughput.since
            self.throughput = training
        prefix = kwargs.get("metric_key_prefix", "eval")
        assert output.metrics is not None
        scores = self.answer_scores() if self.answer_scores else {}
        found = {f"{prefix}_{name}": value for name, value in {**found, **scores}.items()}
        output.metrics.update(found)
        return output

    def evaluation(self) -> dict[str, float]:
        """What was measured in the evaluation that is about to end."""
        return self.throughput.evaluation(self.accelerator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.throughput.since_last_log(self.accelerator)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:
        """transformers' walks over all modules, in every micro-batch, to count parameters."""
        return self.throughput.flops_of(inputs)

    # Counters

    def counters(self) -> Counters:
        return {**super().counters(), "throughput": self.throughput.state()}

    def restore_counters(self, counted: list[Counters]) -> None:
        """Throughput is the sum of what each process has counted."""
        super().restore_counters(counted)
        rank, world_size = self.args.process_index, self.args.world_size
        self.throughput.restore([each["throughput"] for each in counted[rank::world_size]])


def activation_offloading(model: Any, args: SFTConfig) -> Any:
    """A context of a training step: trl's, where the recipe asks for it."""
    if not args.activation_offloading:
        return nullcontext()
    from trl.models import get_act_offloading_ctx_manager

    return get_act_offloading_ctx_manager(model)
