"""One run, from the base model to a finished run folder."""

import warnings
from typing import TYPE_CHECKING

from rich.console import Console

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.prepare import Prepared
from finetuning.data.templates import MarkerTemplate
from finetuning.inference.generation import ask
from finetuning.launch.strategy import Strategy
from finetuning.recipe.recipe import Recipe
from finetuning.runs.folder import read_samples, write_finish, write_samples
from finetuning.runs.terminal import print_answers
from finetuning.training.callbacks import MetricsFile, Watchdog
from finetuning.training.loggers import log_samples
from finetuning.training.signals import Stop
from finetuning.training.start_checks import StartChecks
from finetuning.training.stopping import SynchronizedStop
from finetuning.training.trainer import loss_before_and_after, make_trainer

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
    questions = (
        recipe.generation.prompts if trainer.is_world_process_zero() or strategy.is_sharded else []
    )

    def answers() -> list[str]:
        return ask(trainer.model, tokenizer, template, recipe.generation, questions)

    trainer.add_callback(
        StartChecks(trainer, recipe, strategy, prepared.fingerprint, answers, console)
    )
    trainer.add_callback(MetricsFile(trainer.run_folder))
    trainer.add_callback(Watchdog())
    trainer.add_callback(SynchronizedStop(stop))
    with stop.after_a_step():
        trainer.resume_or_train()
        losses = loss_before_and_after(trainer)
    trainer.save_trained()
    after = answers()

    if trainer.is_world_process_zero():
        before = read_samples(trainer.run_folder)
        samples = [
            sample._replace(after=answer) for sample, answer in zip(before, after, strict=True)
        ]
        write_samples(trainer.run_folder, samples)
        log_samples(recipe, trainer.run_folder, samples, trainer.state.global_step)
        write_finish(trainer.run_folder)
        print_answers(console, samples)
    console.print(losses)
    console.print(f"run folder: {trainer.run_folder}")
    # Torch asks for it, lest a process leaves while another still has something to receive from it by NCCL.
    trainer.accelerator.end_training()
