"""What is asked of the prepared model before its first step."""

import socket
from typing import Any

from accelerate.utils import gather_object
from rich.console import Console
from transformers import TrainerCallback

from finetuning.launch.software import require_same_software, software
from finetuning.launch.step_size import StepSize
from finetuning.launch.strategy import launch_of, require_strategy
from finetuning.model.isolation import require_isolation
from finetuning.runs.environment import write_start
from finetuning.training.answers import evaluate_base
from finetuning.training.memory_check import check_memory
from finetuning.training.preference_trainer import PreferenceTrainer
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.reference import find_reference
from finetuning.training.samples import ask_before_training
from finetuning.training.trainer import ResponseTrainer


def check_strategy(trainer: ResponseTrainer, run: PreparedRun) -> None:
    """Do the processes share the work as they were asked to?"""
    require_strategy(trainer, run.strategy)


def check_software(trainer: ResponseTrainer, run: PreparedRun) -> None:
    """Is the software the same on every machine?"""
    require_same_software(gather_object([(socket.gethostname(), software())]))


def check_logits(trainer: ResponseTrainer, run: PreparedRun) -> None:
    """Is what the head scores the model's loss?"""
    trainer.head.require_unmodified_logits(trainer.model, trainer.args.device)


def check_packing(trainer: ResponseTrainer, run: PreparedRun) -> None:
    """Do packed examples not see each other?"""
    if run.recipe.data.layout == "packed":
        longest = run.examples.train.longest
        is_half = trainer.args.bf16 or trainer.args.fp16
        are_pairs = run.recipe.data.is_preference
        device = trainer.args.device
        require_isolation(trainer.model, longest, is_half, device, are_pairs=are_pairs)


def check_reference(trainer: ResponseTrainer, run: PreparedRun) -> None:
    """Is the model, of preference tuning, its own reference before the first step?"""
    if isinstance(trainer, PreferenceTrainer):
        find_reference(trainer, run)


CHECKS = (
    check_strategy,
    check_software,
    check_logits,
    check_packing,
    check_memory,  # Does the longest batch fit?
    check_reference,
)


class StartChecks(TrainerCallback):
    """Raises UserError where one of CHECKS fails; then begins the run folder.

    On the prepared model, because under ZeRO-3 and FSDP no process can ask its part of it alone. A
    run that is refused here leaves nothing behind.
    """

    def __init__(self, trainer: ResponseTrainer, run: PreparedRun, console: Console) -> None:
        self.trainer, self.run, self.console = trainer, run, console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for check in CHECKS:
            check(self.trainer, self.run)
        self.trainer.remember_weights()
        if not state.global_step:  # else the model has learnt since
            ask_before_training(self.trainer, self.run)
            evaluate_base(self.trainer, self.run, self.console)
        if state.is_world_process_zero:
            launch = launch_of(self.trainer, self.run.strategy)
            launch["rows"] = self.run.examples.report["rows"]
            fingerprint = self.run.examples.fingerprint
            write_start(self.trainer.run_folder, self.run.recipe, fingerprint, launch)
            how = f"{self.run.strategy}, {launch['precision']}, on {launch['device']}"
            self.console.print(f"runs as  {how}")
            self.console.print(f"step     {step_of(self.trainer).in_words()}")


def step_of(trainer: ResponseTrainer) -> StepSize:
    """As it is trained: check_memory may have halved the micro-batch."""
    args = trainer.args
    return StepSize(
        args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    )
