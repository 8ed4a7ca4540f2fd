"""A transformers.Trainer whose run survives being killed at any instant."""

import json
import os
import shutil
import signal
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, Trainer
from trl import SFTConfig

from finetuning.errors import Stopped
from finetuning.runs.checkpoints import (
    UNFINISHED,
    clear_unfinished,
    move_into,
    seal,
    seal_and_rotate,
)
from finetuning.training.divergence import FirstNonFinite, diverged, norms_of, unmoved
from finetuning.training.signals import SIGNALS, block_signals

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

Counters = dict[str, Any]


class ResumableTrainer(Trainer):
    """transformers' trainer, which writes whole and finite checkpoints, and resumes exactly.

    Overridden because, measured: checkpoints are written in place, and the one with the highest
    number is resumed, whole or not, silently also where optimizer or random numbers are missing;
    the losses since the last log are forgotten. What a step computes is said in trainer.py.
    """

    args: SFTConfig
    model: "PreTrainedModel"
    optimizer: torch.optim.Optimizer

    evaluation_is_due = False
    """of a checkpoint: the evaluation of its step was cut short"""

    def __init__(
        self,
        *,
        generation_config: "GenerationConfig | None" = None,
        early_stopping: EarlyStoppingCallback | None = None,
        **kwargs: Any,
    ) -> None:
        use_cache = kwargs["model"].config.use_cache
        super().__init__(**kwargs)
        # It turns it off there, and would save it so. A step here says use_cache=False itself.
        kwargs["model"].config.use_cache = use_cache
        self.generation_config = generation_config
        self.early_stopping = early_stopping
        if early_stopping:
            self.add_callback(early_stopping)
        self.first_non_finite = FirstNonFinite(self.args.device)
        self.norms_at_start: torch.Tensor | None = None

    @property
    def run_folder(self) -> Path:
        return Path(str(self.args.output_dir)).expanduser()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.first_non_finite.look_at(loss, self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            # transformers divides the losses of all steps by the steps since the run was resumed.
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not beyond the last step: transformers would train on where a run is resumed at its very
        end, or at the evaluation that stops it early.

        Signals are blocked until the first batch is requested. By then the processes that load
        batches have started; in the first epoch of a resumed run they are of a loader that
        accelerate makes.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        with block_signals():
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see _run_epoch
        return super().get_batch_samples(*args, **kwargs)

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
        """The best step's checkpoint by its final path: transformers names, when it saves, the
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
            "evaluation_is_due": self.evaluation_is_due,
            "evaluations_without_gain": self.early_stopping.early_stopping_patience_counter
            if self.early_stopping
            else 0,
        }

    def restore_counters(self, counted: list[Counters]) -> None:
        """Counts on from what each process of the checkpoint had counted, of whatever number they
        were. A logged loss is the mean of the processes' losses.
        """
        rank, world_size = self.args.process_index, self.args.world_size
        losses = [each["loss"] for each in counted]
        self._tr_loss += losses[rank] if len(counted) == world_size else fmean(losses)
        self._globalstep_last_logged = counted[0]["last_logged"]
        self._total_loss_scalar = counted[0]["total_loss"]
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
