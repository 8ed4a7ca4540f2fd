"""All processes stop after the same step."""

import signal
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from finetuning.errors import Stopped
from finetuning.training.divergence import diverged
from finetuning.training.signals import Stop
from finetuning.training.trainer import ResponseTrainer

LAST_STEP = 2**40  # no run has so many
NOT_FINITE = 2**39  # below are the numbers of signals


class SynchronizedStop(TrainerCallback):
    """Where a process is asked to stop: one checkpoint, after a step that all processes agree on,
    then Stopped. Where a loss is not finite: no checkpoint, and UserError.

    The question goes round while the next step is computed, over a group of its own on the CPU, and
    is answered at that step's end: nobody waits for it, and no device is asked.
    """

    def __init__(self, stop: Stop, trainer: ResponseTrainer | None = None) -> None:
        self.stop, self.trainer = stop, trainer
        self.question: tuple[Any, torch.Tensor] | None = None
        self.number = 0  # that all processes agreed on, see poll_stop
        self.in_training = False
        self.saved = 0  # the step of the last checkpoint
        self.ends_epoch = False
        """the step that was the last of its epoch is over, what comes with the epoch's end is not
        """
        self.postponed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_training, self.saved = True, state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number = self.number or self.poll_stop()
        if self.number > NOT_FINITE:
            self.end(state)
        control.should_save |= bool(self.number)
        # What comes with the end of an epoch, logs and an evaluation, belongs into the checkpoint
        # of its last step.
        self.ends_epoch = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if self.ends_epoch:
            self.postponed, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.postponed
        self.postponed = self.ends_epoch = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation may take longer than a scheduler waits. It is cut short where its step is,
        or can be, saved.
        """
        if self.stop.phase == "training" and not self.ends_epoch:
            self.number = self.number or self.poll_stop()
            if self.number and (self.in_training or self.saved == state.global_step):
                self.end(state)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.number = self.number or self.finish_poll()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step
        if self.number:
            self.end(state)

    def end(self, state: Any) -> None:
        self.finish_poll()
        if self.number > NOT_FINITE:
            step = LAST_STEP - self.number
            assert self.trainer is not None
            raise diverged(self.trainer.args, f"the loss of step {step} is not finite")
        number = signal.Signals(self.number)
        place = f"step {state.global_step} of {state.max_steps}"
        raise Stopped(number, f"stopped by {number.name} after {place}; the same command resumes")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.in_training = False
        self.number = self.number or self.finish_poll()

    @cached_property
    def group(self) -> Any:
        """Of all processes, on the CPU; None where there is one. They make it when they first ask
        each other.
        """
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        return None if is_alone else dist.new_group(backend="gloo")

    def poll_stop(self) -> int:
        """The highest number that any process had a step ago; at once where there is only one.

        That of a signal, or LAST_STEP less the first step whose loss was not finite.
        """
        own = int(self.stop.signal or 0)
        if self.trainer and (step := self.trainer.first_non_finite.poll()):
            own = LAST_STEP - step
        if self.group is None:
            return own
        answer = self.finish_poll()
        flag = torch.tensor([own])
        self.question = (
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True),
            flag,
        )
        return answer

    def finish_poll(self) -> int:
        if self.question is None:
            return 0
        work, flag = self.question
        work.wait()
        self.question = None
        return int(flag)
