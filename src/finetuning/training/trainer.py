"""Recipe, model and examples -> a trl.SFTTrainer whose steps do only the work the loss needs."""

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from finetuning.data.batching import Batch, BatchSampler, Collator, ExampleSet
from finetuning.data.prepare import Prepared
from finetuning.data.tokenization import Examples
from finetuning.errors import UserError, one_line
from finetuning.model.attention import Packing, packed_as, use_packed_attention
from finetuning.model.loading import fuse_gelu, load_model
from finetuning.model.lora import lora_config
from finetuning.model.loss import ResponseHead, Targets, require_plain_head
from finetuning.model.quantization import cast_adapter_to_float32
from finetuning.model.throughput import Throughput
from finetuning.recipe.recipe import Recipe
from finetuning.training.memory_check import TooLarge, halve_micro_batch
from finetuning.training.resumable import ResumableTrainer
from finetuning.training.sft_config import make_arguments
from finetuning.training.signals import block_signals, worker_ignores_signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class ResponseTrainer(ResumableTrainer):
    """trl's trainer with our batches, our loss and an evaluation that counts every response token once.

    Overridden because, measured: trl scores every position outside of CUDA and recomputes logits in backward; it asks
    the device for metrics in every micro-batch; Trainer optimizer_slots evaluation losses over batches, so that a token of a
    short answer weighs more than one of a long answer.
    """

    def __init__(
        self,
        *,
        train_examples: Examples,
        eval_examples: Examples | None = None,
        order: str = "random",
        batch_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        cast_adapter_to_float32(self.model)
        self.train_examples, self.eval_examples = train_examples, eval_examples
        self.order, self.batch_tokens = order, batch_tokens
        self.head = ResponseHead(self.accelerator.unwrap_model(self.model))
        self.throughput = Throughput(self.model, self.args.device)
        self.model_accepts_loss_kwargs = (
            True  # the loss is divided by num_items_in_batch, in compute_loss
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return super().train(*args, **kwargs)
            except TooLarge:
                pass  # its traceback holds what did not fit
            halve_micro_batch(self)

    def get_train_dataloader(self) -> DataLoader:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return self.load(
            self.train_examples,
            batch_size=self.args.per_device_train_batch_size,
            tokens=self.batch_tokens,
            accumulation=self.args.gradient_accumulation_steps,
            seed=None if self.order == "sequential" else seed,
            by_length=self.order == "by_length",
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self.load(self.eval_examples, batch_size=self.args.per_device_eval_batch_size)

    def load(self, examples: Examples, **kwargs: Any) -> DataLoader:
        """A loader of this process's batches. accelerate does not share them out again: it would repeat examples."""
        processes, process = self.args.world_size, self.args.process_index
        return EpochLoader(
            ExampleSet(examples),
            batch_sampler=BatchSampler(
                examples.lengths, processes=processes, process=process, **kwargs
            ),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=worker_ignores_signals,
            generator=torch.Generator(),  # its own, lest the loader draw from the random numbers of training
        )

    def training_step(
        self, model: Any, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        with packed_as(
            self.packing(inputs)
        ):  # until backward is done: checkpointed layers attend again
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Cross-entropy of the response tokens; over the tokens of the whole step, on all processes, in training."""
        targets = Targets(inputs["positions"], inputs["targets"])
        arguments = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
        with self.head.scoring(targets):
            loss = model(**arguments, use_cache=False).logits
        self.throughput.count(inputs, self.head.scores)
        if num_items_in_batch is None:
            return loss / max(1, len(targets.tokens))
        # DDP and ZeRO average gradients over processes, each of which has only its own tokens.
        return loss * (self.accelerator.num_processes / num_items_in_batch)

    def prediction_step(
        self, model: Any, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), packed_as(self.packing(inputs)):
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        training, self.throughput = self.throughput, Throughput(self.model, self.args.device)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            loss, accuracy = self.throughput.loss_and_accuracy(self.accelerator)
        finally:
            training.since += (
                time.perf_counter() - self.throughput.since
            )  # evaluating is no training time
            self.throughput = training
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = loss
        output.metrics[f"{prefix}_perplexity"] = math.exp(min(loss, 700.0))
        output.metrics[f"{prefix}_mean_token_accuracy"] = accuracy
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.throughput.since_last_log(self.accelerator)
        super().log(logs, start_time)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """On the device, without the labels: they are counted by now, and the loss takes its targets."""
        return super()._prepare_inputs(
            {name: value for name, value in inputs.items() if name != "labels"}
        )

    def _prepare_input(self, data: Any) -> Any:
        """Without waiting: transformers' copies one tensor after another to its end, pinned or not."""
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def packing(self, inputs: Batch) -> Packing | None:
        return (
            Packing(tuple(inputs["lengths"]), self.args.device)
            if "position_ids" in inputs
            else None
        )

    def floating_point_ops(self, inputs: Batch) -> int:
        """trl's walks over all modules, in every micro-batch, to count parameters."""
        return self.throughput.flops_of(inputs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """trl writes one with every checkpoint, with loading code that does not fit a subfolder; not wanted."""


class EpochLoader(DataLoader):
    """A DataLoader that tells its batch sampler the epoch, as Trainer expects of accelerate's."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Any:
        with block_signals():
            return super().__iter__()


def make_trainer(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", prepared: Prepared
) -> ResponseTrainer:
    """A trainer ready to train. Raises UserError where model, data and machine do not go together."""
    args = make_arguments(recipe, has_eval=prepared.eval is not None)
    model = load_model(recipe.model, tokenizer, args.seed, args.device)
    require_positions(model, prepared)
    require_plain_head(model, recipe.lora)
    fuse_gelu(model)
    if recipe.data.layout == "packed":
        use_packed_attention(model)
    try:
        return ResponseTrainer(
            train_examples=prepared.train,
            eval_examples=prepared.eval,
            order=recipe.data.order,
            batch_tokens=recipe.data.batch_tokens,
            model=model,
            args=args,
            data_collator=Collator(recipe.data.layout, tokenizer.pad_token_id or 0),
            train_dataset=as_dataset(prepared.train),
            eval_dataset=as_dataset(prepared.eval) if prepared.eval else None,
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
    except ValueError as error:  # what trl and peft find wrong with the settings
        section = "lora" if recipe.lora else "training"
        raise UserError(f"{section}: {one_line(error)}") from error


def as_dataset(examples: Examples) -> "Dataset":
    """The examples as a datasets.Dataset (trl takes no other), without copying their tokens."""
    import pyarrow
    from datasets import Dataset

    offsets = pyarrow.array([0, *examples.ends.tolist()], pyarrow.int64())
    columns = {
        name: pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(getattr(examples, name)))
        for name in ("input_ids", "labels")
    }
    return Dataset(pyarrow.table(columns)).with_format("numpy")


def require_positions(model: "PreTrainedModel", prepared: Prepared) -> None:
    longest = prepared.report["tokens"]["max"]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise UserError(
            f"data.max_length: the longest example has {longest} tokens, the model reads at most {positions}; "
            f"use data.max_length={positions}"
        )


def loss_before_and_after(trainer: ResponseTrainer) -> str:
    """Evaluates, unless that has just been done with these weights, and says how far the held-out loss fell."""
    if trainer.eval_dataset is None:
        return "no evaluation: data.eval is null"
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    is_done = history and history[-1]["step"] == trainer.state.global_step
    if (
        not is_done or trainer.args.load_best_model_at_end
    ):  # then the weights are not those of the last step
        trainer.evaluate()
        history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    first, last = history[0], history[-1]
    return (
        f"held-out response loss {first['eval_loss']:.3f} -> {last['eval_loss']:.3f}, perplexity "
        f"{first['eval_perplexity']:.1f} -> {last['eval_perplexity']:.1f} ({len(trainer.eval_dataset):,} examples)"
    )
