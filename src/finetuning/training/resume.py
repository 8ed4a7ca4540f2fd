"""Training from the last whole checkpoint, if there is one."""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from finetuning.runs.checkpoints import step_of, verify_newest_first
from finetuning.training.loggers import resume_loggers, resume_tensorboard
from finetuning.training.memory_check import TooLarge, halve_micro_batch
from finetuning.training.resumable import Counters
from finetuning.training.trainer import ResponseTrainer
from finetuning.untrusted_text import printable


def resume_or_train(trainer: ResponseTrainer) -> None:
    """Trains to the end. Raises Stopped where a signal asked for it."""
    checkpoint = last_checkpoint(trainer)
    if checkpoint:
        counted = read_counters(Path(checkpoint))
        # The model was evaluated when the run was started.
        trainer.args.eval_on_start = counted[0]["evaluation_is_due"]
        trainer.add_callback(RestoreCounters(trainer, counted))
        resume_tensorboard(trainer, trainer.run_folder, step_of(Path(checkpoint)))
    resume_loggers(trainer, trainer.run_folder)
    while True:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            return
        except TooLarge:
            pass  # its traceback holds what did not fit
        halve_micro_batch(trainer)


def last_checkpoint(trainer: ResponseTrainer) -> str | None:
    """The newest checkpoint that is whole, the same for all processes; others are named on
    stderr."""
    found: list[str | None] = [None]
    if trainer.is_world_process_zero():
        for checkpoint, damage in verify_newest_first(trainer.run_folder):
            if damage:
                print(printable(f"{checkpoint} is not used: {damage}"), file=sys.stderr)
            else:
                found = [str(checkpoint)]
                print(printable(f"resuming from {checkpoint}"), file=sys.stderr)
    broadcast_object_list(found)  # in place
    return found[0]


class RestoreCounters(TrainerCallback):
    """Counts on from where the checkpoint ended; transformers begins anew, after a resume too."""

    def __init__(self, trainer: ResponseTrainer, counted: list[Counters]) -> None:
        self.trainer, self.counted = trainer, counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_counters(self.counted)
        # Else those of the launch that wrote the checkpoint.
        state.compute_steps(args, state.max_steps)
        if len(self.counted) != args.world_size and state.is_world_process_zero:
            before = f"the checkpoint is of {len(self.counted)} process(es)"
            print(
                f"{before}: random numbers, such as dropout's, differ from here on", file=sys.stderr
            )


def read_counters(checkpoint: Path) -> list[Counters]:
    """What each process had counted, by rank."""
    files = checkpoint.glob("counted_*.json")
    by_rank = sorted(files, key=lambda file: int(file.stem.removeprefix("counted_")))
    return [json.loads(file.read_text(encoding="utf-8")) for file in by_rank]
