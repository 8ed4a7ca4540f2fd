"""Supervised fine-tuning: one recipe in, one trained model or LoRA adapter out.

accelerate launch src/sft.py recipes/dolly_gpt2.yaml
accelerate launch src/sft.py recipes/dolly_gpt2.yaml training.max_steps=10
accelerate launch --config_file accelerate_configs/cpu.yaml src/sft.py recipes/quickstart.yaml
accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 8 \\
  src/sft.py recipes/dolly_gpt2.yaml
python src/sft.py --check recipes/dolly_gpt2.yaml

Arguments after the recipe are overrides, section.key=value. The run folder (training.output_dir)
then holds weights or adapter, tokenizer, recipe.yaml, environment.json, metrics.jsonl and
samples.md. The same command resumes a run that was stopped from its last checkpoint; Ctrl-C,
SIGTERM and SIGUSR1 have it write one first. --check ends before a model is loaded, when recipe,
data and run folder are known to be right and the libraries take every setting; --config_file and
--num_processes say how it would be launched. --verbose shows what the libraries log and warn of.
"""

import os
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

from finetuning.command_line import ArgumentParser
from finetuning.script import run


def main(arguments: list[str]) -> None:
    from finetuning.launch.launcher import leave_precision_to_recipe
    from finetuning.launch.software import versions
    from finetuning.launch.step_size import step_size
    from finetuning.launch.strategy import launch_environment, requested_strategy
    from finetuning.model.quantization import hide_bitsandbytes
    from finetuning.publishing.provenance import unlike_published
    from finetuning.recipe.recipe import load_recipe
    from finetuning.recipe.without_effect import settings_without_effect
    from finetuning.runs.folder import (
        lock,
        output_folder,
        require_free_or_ours,
        require_local_output,
    )
    from finetuning.runs.reopen import (
        is_finished,
        open_run_folder,
        take_changes,
        with_real_folder,
    )
    from finetuning.runs.terminal import make_console, print_funnel
    from finetuning.training.loggers import require_loggers
    from finetuning.training.prepared_run import prepare_run
    from finetuning.training.signals import Stop

    stop = Stop()
    stop.listen()
    options = read_arguments(arguments)
    is_check = options.check
    recipe = load_recipe(options.recipe, options.overrides)
    require_local_output(Path(options.recipe), recipe, options.overrides)
    recipe = with_real_folder(recipe, Path(options.recipe))
    require_free_or_ours(output_folder(recipe))
    console = make_console(quiet=os.environ.get("RANK", "0") != "0")
    if line := leave_precision_to_recipe():
        console.print(line)
    if is_check:
        os.environ |= launch_environment(options.config_file, options.num_processes)
    strategy = requested_strategy()
    step_size(recipe, strategy.processes)
    require_loggers(recipe, output_folder(recipe))
    run = prepare_run(recipe, strategy, trains_here=not is_check)
    recipe, examples = run.recipe, run.examples
    folder = open_run_folder(recipe, examples.fingerprint, None if is_check else strategy)
    if finished := is_finished(folder, recipe):
        if not (is_check or console.quiet):
            take_changes(folder, recipe)
        console.print(
            f"{folder} is finished ({finished}); to train longer, raise "
            "training.num_train_epochs or max_steps; to train anew, choose another "
            "training.output_dir"
        )
        return
    with nullcontext() if console.quiet else lock(folder):
        print_funnel(console, examples.report)
        for difference in unlike_published(Path(options.recipe), examples.fingerprint, versions()):
            console.print(f"not as published: {difference}")
        for line in settings_without_effect(recipe):
            console.print(line)
        hide_bitsandbytes(recipe)
        if is_check:
            from finetuning.training.check import check

            unseen = check(run, folder)
            console.print(f"recipe, data and {folder} are right; nothing was trained")
            for line in unseen:
                console.print(f"not looked at: {line}")
            return
        # On a CPU that others use too, threads that spin while they wait for each other cost eight
        # times the seconds.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Torch and transformers take seconds to import: only now, when recipe and data are known
        # to be right.
        from finetuning.training.train import train

        train(run, stop, console)


def read_arguments(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--config_file")
    parser.add_argument("--num_processes")
    return parser.read(arguments)


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command resumes from the last checkpoint")
