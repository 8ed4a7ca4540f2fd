"""Supervised fine-tuning: one recipe in, one trained model or LoRA adapter out.

accelerate launch src/sft.py recipes/dolly_gpt2.yaml
accelerate launch src/sft.py recipes/dolly_gpt2.yaml training.max_steps=10 training.output_dir=outputs/try
accelerate launch --config_file accelerate_configs/cpu.yaml src/sft.py recipes/quickstart.yaml

Arguments after the recipe are overrides, section.key=value. The run folder (training.output_dir) then holds weights or
adapter, tokenizer, recipe.yaml, environment.json, metrics.jsonl and samples.md. A run that was stopped goes on from its
last checkpoint when the same command is given again.
"""

import os

from finetuning.errors import run


def main(arguments: list[str]) -> None:
    from rich.console import Console

    from finetuning.cache import cache_folder, prepare
    from finetuning.data import load_template, training_texts
    from finetuning.loggers import hide_wandb, log_samples, require_loggers
    from finetuning.model import load_tokenizer
    from finetuning.reach import needs_of, require_hub
    from finetuning.recipe import load_recipe
    from finetuning.report import print_answers, print_funnel
    from finetuning.run_folder import open_run_folder, output_folder, write_finish, write_samples, write_start

    recipe = load_recipe(arguments[0], arguments[1:])
    require_loggers(recipe, output_folder(recipe))
    require_hub(needs_of(recipe))
    tokenizer = load_tokenizer(recipe.model, training_texts(recipe.data))
    prepared = prepare(recipe.data, tokenizer, cache_folder())
    folder = open_run_folder(recipe, prepared.fingerprint)
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    print_funnel(console, prepared.report)

    hide_wandb(recipe)
    # On a CPU that others use too, threads that spin while they wait for each other cost eight times the seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch and trl take ten seconds to import: only now, when recipe and data are known to be right.
    from finetuning.answers import ask
    from finetuning.trainer import last_checkpoint, launch_of, loss_before_and_after, make_trainer

    trainer = make_trainer(recipe, tokenizer, prepared, folder)
    template = load_template(recipe.data, tokenizer)
    questions = recipe.generation.prompts if trainer.is_world_process_zero() else []
    before = ask(trainer.model, tokenizer, template, recipe.generation, questions)
    if trainer.is_world_process_zero():
        write_start(folder, recipe, prepared.fingerprint, launch_of(trainer))
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    losses = loss_before_and_after(trainer)
    trainer.save_model(str(folder))
    after = ask(trainer.model, tokenizer, template, recipe.generation, questions)

    if trainer.is_world_process_zero():
        samples = list(zip(questions, before, after, strict=True))
        write_samples(folder, samples)
        log_samples(recipe, folder, samples, trainer.state.global_step)
        write_finish(folder)
        print_answers(console, samples)
    console.print(losses)
    console.print(f"run folder: {folder}")


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command goes on from the last checkpoint")
