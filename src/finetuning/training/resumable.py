"""A trl.SFTTrainer whose runs survive being killed: checkpoints are whole or not there, and resuming is exact."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from trl import SFTTrainer

from finetuning.errors import Stopped
from finetuning.training.checkpoints import (
    UNFINISHED,
    clear_unfinished,
    move_into,
    seal_and_rotate,
    verify_newest_first,
)
from finetuning.training.signals import SIGNALS, block_signals


class ResumableTrainer(SFTTrainer):
    """trl's trainer with checkpoints that can be trusted.

    Overridden because, measured: transformers writes checkpoints in place, takes the one with the highest number whole
    or not, resumes without a word where optimizer or random numbers are missing, and forgets the losses since the last
    log.
    """

    evaluation_is_due = False
    """of a checkpoint: its step's evaluation was cut short"""

    @property
    def run_folder(self) -> Path:
        return Path(self.args.output_dir).expanduser()

    def resume_or_train(self) -> None:
        """From the last whole checkpoint, if there is one, to the end. Raises Stopped where a signal asked for it."""
        checkpoint = self.last_checkpoint()
        if checkpoint:  # it was evaluated when it started
            counted = read_counters(checkpoint)
            self.args.eval_on_start = counted[0]["evaluation_is_due"]
            self.add_callback(RestoreCounters(self, counted))
        self.train(resume_from_checkpoint=checkpoint)

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that is whole, the same for all processes; others are named on stderr."""
        found = [None]
        if self.is_world_process_zero():
            for checkpoint, damage in verify_newest_first(self.run_folder):
                if damage:
                    print(f"{checkpoint} is not used: {damage}", file=sys.stderr)
                else:
                    found = [str(checkpoint)]
                    print(f"going on from {checkpoint}", file=sys.stderr)
        return broadcast_object_list(found)[0]

    def _run_epoch(self, **kwargs: Any) -> None:
        """Not beyond the last step: transformers would train on where a run is resumed at its very end.

        Signals are held back until the first batch is asked for. By then the processes that load batches are born; in
        the first epoch of a run that goes on they are of a loader that accelerate makes.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        with block_signals():
            super()._run_epoch(**kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return super().get_batch_samples(*args, **kwargs)

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Where a signal cuts it short, the step before is saved; a run that goes on from there evaluates first.

        transformers skips the scheduler for the evaluation at a start: here that may be the one that was cut short.
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
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        self.name_best()
        return is_best

    def name_best(self) -> None:
        """The best step's checkpoint where it will lie: transformers names, at its saving, the place aside."""
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(
                self.run_folder / f"checkpoint-{self.state.best_global_step}"
            )

    def _get_output_dir(self, trial: Any) -> str:
        """Checkpoints are written aside."""
        return str(self.run_folder / UNFINISHED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Killed at any instant, a run finds whole checkpoints only: this one is put in place when all of it is there.

        transformers writes in place and removes old ones by their number, whole or not.
        """
        is_main, step = self.is_world_process_zero(), self.state.global_step
        try:
            if is_main:
                clear_unfinished(self.run_folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.name_best()
            self.accelerator.wait_for_everyone()
            if is_main:
                written = self.run_folder / UNFINISHED / f"checkpoint-{step}"
                self.state.save_to_json(str(written / "trainer_state.json"))
                seal_and_rotate(
                    written,
                    self.run_folder,
                    self.args.save_total_limit,
                    self.state.best_global_step,
                )
        except Exception:  # a full disk: what was begun takes room
            shutil.rmtree(self.run_folder / UNFINISHED, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        """With it, for each process, what was counted since the last log: transformers begins anew after a resume."""
        super()._save_rng_state(output_dir)
        counted = {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "throughput": self.throughput.state(),
            "evaluation_is_due": self.evaluation_is_due,
        }
        Path(output_dir, f"counted_{self.args.process_index}.json").write_text(
            json.dumps(counted), encoding="utf-8"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if (
            "train_loss" in logs
        ):  # transformers divides the losses of all steps by the steps since the run went on
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)

    def restore_counters(self, counted: list[dict[str, Any]]) -> None:
        """Goes on with what the processes of the checkpoint had counted, as many as they were."""
        rank, world_size = self.args.process_index, self.args.world_size
        is_as_before = len(counted) == world_size
        if not is_as_before and self.is_world_process_zero():
            print(
                f"the checkpoint is of {len(counted)} process(es): random numbers are others",
                file=sys.stderr,
            )
        # A logged loss is the mean of the processes' losses, throughput the sum of what each has counted.
        losses = [each["loss"] for each in counted]
        self._tr_loss += losses[rank] if is_as_before else fmean(losses)
        self._globalstep_last_logged = counted[0]["last_logged"]
        self._total_loss_scalar = counted[0]["total_loss"]
        self.throughput.restore([each["throughput"] for each in counted[rank::world_size]])

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """As transformers does, but without three things that it leaves behind.

        training_args.bin, a pickle; under ZeRO-1 and 2 a copy of the output layer's tied weight; mode 0600 of the
        weights, which keeps a group from reading them.
        """
        if state_dict and getattr(self.model.config, "tie_word_embeddings", False):
            tied = (
                getattr(self.accelerator.unwrap_model(self.model), "_tied_weights_keys", None) or {}
            )
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)
            umask = os.umask(0)
            os.umask(umask)
            for file in Path(output_dir).glob("*.safetensors"):
                file.chmod(0o666 & ~umask)

    def save_trained(self) -> None:
        """Weights or adapter, whole, and the tokenizer into the run folder, by way of a folder aside."""
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        if self.is_world_process_zero():
            clear_unfinished(self.run_folder)
        self.accelerator.wait_for_everyone()
        self.save_model(str(self.run_folder / UNFINISHED))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            move_into(self.run_folder / UNFINISHED, self.run_folder)


class RestoreCounters(TrainerCallback):
    """Goes on counting where the checkpoint ended; transformers begins anew, after a resume too."""

    def __init__(self, trainer: ResumableTrainer, counted: list[dict[str, Any]]) -> None:
        self.trainer, self.counted = trainer, counted

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_counters(self.counted)


def read_counters(checkpoint: str) -> list[dict[str, Any]]:
    """What each process had counted, by rank."""
    files = Path(checkpoint).glob("counted_*.json")
    by_rank = sorted(files, key=lambda file: int(file.stem.removeprefix("counted_")))
    return [json.loads(file.read_text(encoding="utf-8")) for file in by_rank]
