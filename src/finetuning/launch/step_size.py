"""How many examples a step takes: micro-batch x accumulation x processes."""

from dataclasses import dataclass

from finetuning.errors import UserError
from finetuning.recipe.recipe import Recipe


@dataclass(frozen=True)
class StepSize:
    micro_batch: int
    """examples that a process computes at once"""
    accumulation: int
    """micro-batches of a process in a step"""
    processes: int

    @property
    def total(self) -> int:
        return self.micro_batch * self.accumulation * self.processes

    def __str__(self) -> str:
        return f"{self.processes} x {self.accumulation} x {self.micro_batch} = {self.total}"

    def in_words(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        plural = "" if self.accumulation == 1 else "es"
        accumulation = f"{self.accumulation} micro-batch{plural}"
        return f"{processes} x {accumulation} x {self.micro_batch} = {self.total} examples"


def step_size(recipe: Recipe, processes: int) -> StepSize:
    """As the recipe says it; with training.global_batch_size the same examples whatever the number
    of processes; a process's part of it is at most that.

    Raises UserError where that number does not divide.
    """
    training = recipe.training
    micro_batch, total = training.per_device_train_batch_size, training.global_batch_size
    if total is None:
        return StepSize(micro_batch, training.gradient_accumulation_steps, processes)
    share, rest = divmod(total, processes)
    if rest:
        near = max(1, round(total / processes)) * processes
        raise UserError(
            f"training.global_batch_size: {total} examples cannot be shared out evenly to "
            f"{processes} processes; use "
            f"{near}, or a number of processes that divides {total}"
        )
    micro_batch = min(micro_batch, share)
    if "per_device_train_batch_size" not in training.model_fields_set:
        micro_batch = max(size for size in range(1, micro_batch + 1) if share % size == 0)
    if share % micro_batch:
        raise UserError(
            f"training.per_device_train_batch_size: {micro_batch} does not divide the {share} "
            "examples of a step that "
            f"each of {processes} processes has (training.global_batch_size {total}); leave it "
            "out, or use a divisor"
        )
    return StepSize(micro_batch, share // micro_batch, processes)


def smaller(micro_batch: int, accumulation: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of the same step with micro-batches of half the size; an odd one
    is divided by more.

    The micro-batch has more than one example.
    """
    factor = next(number for number in range(2, micro_batch + 1) if micro_batch % number == 0)
    return micro_batch // factor, accumulation * factor
