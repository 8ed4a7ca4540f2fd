"""Recipe, model and examples -> a trl.SFTTrainer whose steps do only the work the loss needs."""

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetuning.attention import Packing, isolate, packed_as, require_isolation
from finetuning.batching import Batch, BatchSampler, Collator, ExampleSet
from finetuning.data import Prepared
from finetuning.errors import UserError
from finetuning.loss import ResponseHead, Targets, require_plain_head
from finetuning.model import fuse_gelu, load_model, lora_config, precision
from finetuning.recipe import Recipe
from finetuning.run_folder import append_metrics
from finetuning.throughput import Throughput
from finetuning.tokenization import Examples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class ResponseTrainer(SFTTrainer):
    """trl's trainer with our batches, our loss and an evaluation that counts every response token once.

    Overridden because, measured: trl scores every position outside of CUDA and recomputes logits in backward; it asks
    the device for metrics in every micro-batch; Trainer averages evaluation losses over batches, so that a token of a
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
        self.train_examples, self.eval_examples = train_examples, eval_examples
        self.order, self.batch_tokens = order, batch_tokens
        self.head = ResponseHead(self.accelerator.unwrap_model(self.model))
        self.throughput = Throughput(self.model, self.args.device)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch, in compute_loss

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
            batch_sampler=BatchSampler(examples.lengths, processes=processes, process=process, **kwargs),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            generator=torch.Generator(),  # its own, lest the loader draw from the random numbers of training
        )

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        with packed_as(self.packing(inputs)):  # until backward is done: checkpointed layers attend again
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
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

    def prediction_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), packed_as(self.packing(inputs)):
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        training, self.throughput = self.throughput, Throughput(self.model, self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss, accuracy = self.throughput.loss_and_accuracy(self.accelerator)
        output.metrics[f"{prefix}_loss"] = loss
        output.metrics[f"{prefix}_perplexity"] = math.exp(min(loss, 700.0))
        output.metrics[f"{prefix}_mean_token_accuracy"] = accuracy
        training.since += time.perf_counter() - self.throughput.since  # evaluating is no training time
        self.throughput = training
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.throughput.since_last_log(self.accelerator)
        super().log(logs, start_time)

    def packing(self, inputs: Batch) -> Packing | None:
        return Packing(tuple(inputs["lengths"]), self.args.device) if "position_ids" in inputs else None

    def floating_point_ops(self, inputs: Batch) -> int:
        """trl's walks over all modules, in every micro-batch, to count parameters."""
        return self.throughput.flops_of(inputs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """trl writes one with every checkpoint, with loading code that does not fit a subfolder; not wanted."""


class EpochLoader(DataLoader):
    """A DataLoader that tells its batch sampler the epoch, as Trainer expects of accelerate's."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class MetricsFile(TrainerCallback):
    """Appends what is logged to metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_metrics(self.folder, {"step": state.global_step, **logs})


def make_trainer(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", prepared: Prepared, folder: Path
) -> ResponseTrainer:
    """A trainer ready to train. Raises UserError where model, data and machine do not go together."""
    args = make_arguments(recipe, has_eval=prepared.eval is not None)
    require_whole_weights(args)
    model = load_model(recipe.model, tokenizer, args.seed)
    require_positions(model, prepared)
    require_plain_head(model, recipe.lora)
    fuse_gelu(model)
    if recipe.data.layout == "packed":
        isolate(model)
        require_isolation(model)
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
            callbacks=[MetricsFile(folder)],
        )
    except ValueError as error:  # what trl and peft find wrong with the settings
        section = "lora" if recipe.lora else "training"
        raise UserError(f"{section}: {' '.join(str(error).split())}") from error


def make_arguments(recipe: Recipe, has_eval: bool) -> SFTConfig:
    """The training section as SFTConfig, with what other sections decide."""
    has_gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if has_gpu else None
    settings = recipe.training.model_dump(exclude_unset=True)
    settings |= precision(recipe, torch.device("cuda" if has_gpu else "cpu"), capability)
    settings |= {
        # Examples come tokenized and masked; trl would tokenize, cut and pack them again.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,
        "padding_free": False,
    }
    settings.setdefault("use_cpu", not has_gpu)  # two gloo processes find each other only with this flag
    settings.setdefault("dataloader_pin_memory", has_gpu)
    settings.setdefault("ddp_find_unused_parameters", False)  # every parameter is used; looking costs a walk a step
    # trl's default of recomputing every activation costs a third of the speed; a recipe asks for it where it must.
    if not settings.get("gradient_checkpointing"):  # the old name
        settings.setdefault("activation_checkpointing", False)
    # Trainer's default replaces a loss that is not a number by the average of those before, and asks the device for
    # it in every micro-batch.
    settings.setdefault("logging_nan_inf_filter", False)
    if has_eval:
        settings.setdefault("eval_on_start", True)  # the loss before training, to compare with
        settings.setdefault("per_device_eval_batch_size", recipe.training.per_device_train_batch_size)
    try:
        return SFTConfig(**settings)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from None


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


def require_whole_weights(args: SFTConfig) -> None:
    """Raises UserError under ZeRO-3 and FSDP, where a process has only a part of each weight.

    The questions asked of the model before training need all of it, and the loss was not tried there.
    """
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if is_fsdp or (args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3):
        name = "FSDP" if is_fsdp else "ZeRO-3"
        raise UserError(f"accelerate: {name} is not supported yet; use one process a GPU: accelerate_configs/ddp.yaml")


def require_positions(model: "PreTrainedModel", prepared: Prepared) -> None:
    longest = prepared.report["tokens"]["max"]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise UserError(
            f"data.max_length: the longest example has {longest} tokens, the model reads at most {positions}; "
            f"use data.max_length={positions}"
        )


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, to continue from."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in checkpoints if (path / "trainer_state.json").exists()]  # trainer writes it last
    return str(whole[-1]) if whole else None


def launch_of(trainer: SFTTrainer) -> dict[str, Any]:
    """How the processes really run, for environment.json."""
    state = trainer.accelerator.state
    return {
        "processes": state.num_processes,
        "distributed_type": state.distributed_type.value,
        "device": str(trainer.args.device),
        "bf16": trainer.args.bf16,
        "fp16": trainer.args.fp16,
    }


def loss_before_and_after(trainer: ResponseTrainer) -> str:
    """Evaluates, unless the last step has just been, and says how far the held-out loss fell."""
    if trainer.eval_dataset is None:
        return "no evaluation: data.eval is null"
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not history or history[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
        history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    first, last = history[0], history[-1]
    return (
        f"held-out response loss {first['eval_loss']:.3f} -> {last['eval_loss']:.3f}, perplexity "
        f"{first['eval_perplexity']:.1f} -> {last['eval_perplexity']:.1f} ({len(trainer.eval_dataset):,} examples)"
    )
