"""A transformers.Trainer with our batches, our loss, and checkpoints that can be trusted."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import EarlyStoppingCallback, Trainer
from trl import SFTConfig

from finetuning.data.batching import Batch, BatchSampler, Collator, ExampleSet
from finetuning.errors import Stopped
from finetuning.model.attention import Packing, packed_as
from finetuning.model.loss import ResponseHead, Targets
from finetuning.model.throughput import Throughput
from finetuning.runs.checkpoints import (
    UNFINISHED,
    clear_unfinished,
    move_into,
    seal,
    seal_and_rotate,
)
from finetuning.training.divergence import FirstNonFinite, diverged, norms_of, unmoved
from finetuning.training.loader import EpochLoader
from finetuning.training.signals import SIGNALS, block_signals, worker_ignores_signals

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

Counters = dict[str, Any]


class ResponseTrainer(Trainer):
    """transformers' trainer, where a step does only the work that the loss needs, and a run
    survives being killed.

    Overridden because, measured: Trainer averages evaluation losses over batches, so that a token
    of a short answer weighs more than one of a long answer; accelerate repeats examples to share
    them out; checkpoints are written in place, and the one with the highest number is resumed,
    whole or not, silently also where optimizer or random numbers are missing; the losses since the
    last log are forgotten. Not trl.SFTTrainer: it wants a datasets.Dataset, casts adapters of
    quantized models to bfloat16 and asks the device for metrics in every micro-batch.
    """

    args: SFTConfig
    model: "PreTrainedModel"
    optimizer: torch.optim.Optimizer
    data_collator: Collator
    train_dataset: ExampleSet
    eval_dataset: ExampleSet | None

    evaluation_is_due = False
    """of a checkpoint: the evaluation of its step was cut short"""
    answer_scores: Callable[[], dict[str, float]] | None = None
    """of the answers that the model gives now, where they decide which step is the best"""

    def __init__(
        self,
        *,
        order: str = "random",
        batch_tokens: int | None = None,
        generation_config: "GenerationConfig | None" = None,
        early_stopping: EarlyStoppingCallback | None = None,
        **kwargs: Any,
    ) -> None:
        use_cache = kwargs["model"].config.use_cache
        super().__init__(**kwargs)
        # It turns it off there, and would save it so. A step here says use_cache=False itself.
        kwargs["model"].config.use_cache = use_cache
        self.order, self.batch_tokens = order, batch_tokens
        self.generation_config = generation_config
        self.early_stopping = early_stopping
        if early_stopping:
            self.add_callback(early_stopping)
        self.head = ResponseHead(self.accelerator.unwrap_model(self.model))
        self.throughput = self.new_throughput()
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch
        self.first_non_finite = FirstNonFinite(self.args.device)
        self.norms_at_start: torch.Tensor | None = None
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

    @property
    def run_folder(self) -> Path:
        return Path(str(self.args.output_dir)).expanduser()

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
            # Its own, lest the loader draw from the random numbers of training.
            generator=torch.Generator(),
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see _run_epoch
        return super().get_batch_samples(*args, **kwargs)

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

    def packing(self, inputs: Batch) -> Packing | None:
        """How the examples lie in the batch's one row; None for padded rows."""
        is_packed = "position_ids" in inputs
        return Packing(tuple(inputs["lengths"]), inputs["position_ids"]) if is_packed else None

    # Loss

    def training_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Until backward is done: checkpointed layers attend again.
        with self.offloading, packed_as(self.packing(inputs)):
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.first_non_finite.look_at(loss, self.state.global_step + 1)
        return loss

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
        with torch.no_grad(), self.compute_loss_context_manager(), packed_as(self.packing(inputs)):
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """With the loss of every response token counted once, whatever batch it is in."""
        training, self.throughput = self.throughput, self.new_throughput()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            found = self.throughput.evaluation(self.accelerator)
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.throughput.since_last_log(self.accelerator)
        if "train_loss" in logs:
            # transformers divides the losses of all steps by the steps since the run was resumed.
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:
        """transformers' walks over all modules, in every micro-batch, to count parameters."""
        return self.throughput.flops_of(inputs)

    # Checkpoints

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not beyond the last step: transformers would train on where a run is resumed at its very
        end, or at the evaluation that stops it early.

        Signals are blocked until the first batch is asked for. By then the processes that load
        batches have started; in the first epoch of a resumed run they are of a loader that
        accelerate makes.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        with block_signals():
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Where a signal cuts it short, its step is saved; a run that is resumed from there
        evaluates first.

        transformers skips the scheduler for the evaluation at a start: here that may be the one
        that was cut short.
        """
        at_start, is_overdue = skip_scheduler, skip_scheduler and self.state.global_step > 0
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, at_start and not is_overdue)
        except Stopped:
            if not at_start:
                self.evaluation_is_due = True
                self._save_checkpoint(self.model, trial)
            raise
        if is_overdue:
            self._determine_best_metric(metrics, trial)
            self.name_best()
        return metrics

    def name_best(self) -> None:
        """The best step's checkpoint where it will lie: transformers names, when it saves, the
        place aside.
        """
        if self.state.best_global_step:
            best = self.run_folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)

    def _get_output_dir(self, trial: Any) -> str:
        """Checkpoints are written aside."""
        return str(self.run_folder / UNFINISHED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Killed at any instant, a run finds whole checkpoints only: one is put in place when all
        of it is there.

        transformers writes in place and removes old ones by their number, whole or not.
        """
        self.require_finite_weights()
        try:
            self.begin_saving()
            super()._save_checkpoint(model, trial)
            self.name_best()
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.put_in_place(
                    self.run_folder / UNFINISHED / f"checkpoint-{self.state.global_step}"
                )
        except Exception:  # a full disk: what was begun takes room
            shutil.rmtree(self.run_folder / UNFINISHED, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def require_finite_weights(self) -> None:
        """Raises UserError, in every process, where one of them has a weight that is no number."""
        is_bad = ~norms_of(self.model).isfinite().all() | (self.first_non_finite.step > 0)
        if self.accelerator.reduce(is_bad.long().to(self.args.device)).item():
            step = int(self.first_non_finite.step) or self.state.global_step
            raise diverged(self.args, f"the loss or the weights of step {step} are not finite")

    def remember_weights(self) -> None:
        """As they are before the first step of this launch, for require_moved_weights."""
        self.norms_at_start = norms_of(self.model)
        self.first_step = self.state.global_step

    def require_moved_weights(self) -> None:
        """Raises UserError, in every process, where no step of this launch has changed a weight."""
        steps = self.state.global_step - self.first_step
        # The best weights may be those that this launch began with.
        if self.first_step and (not steps or self.args.load_best_model_at_end):
            return
        assert self.norms_at_start is not None
        has_moved = (norms_of(self.model) != self.norms_at_start).any()
        if not self.accelerator.reduce(has_moved.long().to(self.args.device)).item():
            raise unmoved(self.args, steps)

    def begin_saving(self) -> None:
        if self.is_world_process_zero():
            clear_unfinished(self.run_folder)
        self.accelerator.wait_for_everyone()

    def put_in_place(self, written: Path) -> None:
        self.state.save_to_json(str(written / "trainer_state.json"))
        limit, best = self.args.save_total_limit, self.state.best_global_step
        seal_and_rotate(written, self.run_folder, limit, best)

    def _save_rng_state(self, output_dir: str) -> None:
        """With it, for each process, what was counted since the last log."""
        super()._save_rng_state(output_dir)
        file = Path(output_dir, f"counted_{self.args.process_index}.json")
        file.write_text(json.dumps(self.counters()), encoding="utf-8")

    def counters(self) -> Counters:
        """What transformers begins anew after a resume."""
        return {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "throughput": self.throughput.state(),
            "evaluation_is_due": self.evaluation_is_due,
            "evaluations_without_gain": self.early_stopping.early_stopping_patience_counter
            if self.early_stopping
            else 0,
        }

    def restore_counters(self, counted: list[Counters]) -> None:
        """Counts on from what each process of the checkpoint had counted, of whatever number they
        were.

        A logged loss is the mean of the processes' losses, throughput the sum of what each has
        counted.
        """
        rank, world_size = self.args.process_index, self.args.world_size
        losses = [each["loss"] for each in counted]
        self._tr_loss += losses[rank] if len(counted) == world_size else fmean(losses)
        self._globalstep_last_logged = counted[0]["last_logged"]
        self._total_loss_scalar = counted[0]["total_loss"]
        self.throughput.restore([each["throughput"] for each in counted[rank::world_size]])
        if self.early_stopping:
            # Checkpoints of earlier versions have none.
            without_gain = counted[0].get("evaluations_without_gain", 0)
            self.early_stopping.early_stopping_patience_counter = without_gain
            if without_gain >= self.early_stopping.early_stopping_patience:
                self.control.should_training_stop = True

    def save_trained(self) -> None:
        """Weights or adapter, whole, and the tokenizer into the run folder, by way of a folder
        aside.
        """
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.begin_saving()
        self.save_model(str(self.run_folder / UNFINISHED))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            seal(self.run_folder / UNFINISHED)
            move_into(self.run_folder / UNFINISHED, self.run_folder)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """As transformers does, but without three things that it leaves behind.

        training_args.bin, a pickle; under ZeRO-1 and 2 a copy of the output layer's tied weight;
        mode 0600 of the weights, which keeps a group from reading them.
        """
        model = self.accelerator.unwrap_model(self.model)
        if state_dict and getattr(model.config, "tie_word_embeddings", False):
            tied = getattr(model, "_tied_weights_keys", None) or {}
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.run_folder)
            (folder / "training_args.bin").unlink(missing_ok=True)
            if self.generation_config:  # instead of the base model's
                self.generation_config.to_json_file(folder / "generation_config.json")
            umask = os.umask(0)
            os.umask(umask)
            for file in folder.glob("*.safetensors"):
                file.chmod(0o666 & ~umask)


def activation_offloading(model: Any, args: SFTConfig) -> Any:
    """A context of a training step: trl's, where the recipe asks for it."""
    if not args.activation_offloading:
        return nullcontext()
    from trl.models import get_act_offloading_ctx_manager

    return get_act_offloading_ctx_manager(model)
