"""One run, from the base model to a finished run folder."""

import warnings
from typing import TYPE_CHECKING

from rich.console import Console

from finetuning.answers import ask
from finetuning.callbacks import MetricsFile, StopTogether, Watch
from finetuning.data import Prepared
from finetuning.loggers import log_samples
from finetuning.opening import Opening
from finetuning.recipe import Recipe
from finetuning.report import print_answers
from finetuning.run_folder import read_samples, write_finish, write_samples
from finetuning.stop import Stop
from finetuning.strategy import Strategy
from finetuning.templates import ChatTemplate, MarkerTemplate
from finetuning.trainer import loss_before_and_after, make_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train(
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerFast",
    template: MarkerTemplate | ChatTemplate,
    prepared: Prepared,
    strategy: Strategy,
    stop: Stop,
    console: Console,
) -> None:
    """Trains, from the last checkpoint if there is one, and fills the run folder.

    Raises UserError where model, data, strategy and machine do not go together, Stopped where a signal asked for it.
    """
    # DeepSpeed's collectives warn in every call, hundreds of lines a minute, about names that torch will drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    trainer = make_trainer(recipe, tokenizer, prepared)
    # Where each process holds a part of the weights, all of them have to answer.
    questions = recipe.generation.prompts if trainer.is_world_process_zero() or strategy.is_sharded else []

    def answers() -> list[str]:
        return ask(trainer.model, tokenizer, template, recipe.generation, questions)

    trainer.add_callback(Opening(trainer, recipe, strategy, prepared.fingerprint, answers, console))
    trainer.add_callback(MetricsFile(trainer.run_folder))
    trainer.add_callback(Watch())
    trainer.add_callback(StopTogether(stop))
    with stop.after_a_step():
        trainer.train_on()
        losses = loss_before_and_after(trainer)
    trainer.save_trained()
    after = answers()

    if trainer.is_world_process_zero():
        before = read_samples(trainer.run_folder)
        samples = [sample._replace(after=answer) for sample, answer in zip(before, after, strict=True)]
        write_samples(trainer.run_folder, samples)
        log_samples(recipe, trainer.run_folder, samples, trainer.state.global_step)
        write_finish(trainer.run_folder)
        print_answers(console, samples)
    console.print(losses)
    console.print(f"run folder: {trainer.run_folder}")
    # Torch asks for it, lest a process leaves while another still has something to receive from it by NCCL.
    trainer.accelerator.end_training()
