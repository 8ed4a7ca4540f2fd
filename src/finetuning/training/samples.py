"""The recipe's prompts, asked before and after training."""

from finetuning.inference.generation import Asker
from finetuning.runs.samples import Sample, known_samples, write_samples
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.trainer import ResponseTrainer


def ask_before_training(trainer: ResponseTrainer, run: PreparedRun) -> None:
    """Writes samples.json and samples.md, with the answers of the untrained model."""
    answers = ask_prompts(trainer, run)
    if trainer.is_world_process_zero():
        pairs = zip(run.recipe.generation.prompts, answers, strict=True)
        write_samples(trainer.run_folder, [Sample(*pair) for pair in pairs])


def ask_after_training(trainer: ResponseTrainer, run: PreparedRun) -> list[Sample]:
    """The same with both answers; nothing in processes other than the first."""
    answers = ask_prompts(trainer, run)
    if not trainer.is_world_process_zero():
        return []
    before = {sample.question: sample.before for sample in known_samples(trainer.run_folder) or []}
    pairs = zip(run.recipe.generation.prompts, answers, strict=True)
    samples = [Sample(prompt, before.get(prompt), answer) for prompt, answer in pairs]
    write_samples(trainer.run_folder, samples)
    return samples


def ask_prompts(trainer: ResponseTrainer, run: PreparedRun) -> list[str]:
    """Where each process holds a part of the weights, all of them have to answer."""
    is_asked = trainer.is_world_process_zero() or run.strategy.is_sharded
    generation = run.recipe.generation
    prompts = generation.prompts if is_asked else []
    return Asker(trainer.model, run.tokenizer, run.template, generation)(prompts)
