"""What src/sft.py and src/dpo.py do: one recipe in, one run folder out."""

import os
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.command_line import ArgumentParser
from finetuning.errors import UserError
from finetuning.script import uncollected

if TYPE_CHECKING:
    from rich.console import Console

    from finetuning.recipe.recipe import Recipe
    from finetuning.training.prepared_run import PreparedRun
    from finetuning.training.signals import Stop


def train_recipe(options: Namespace, script: str) -> None:
    """Trains the recipe of the arguments. Raises UserError where another script trains it."""
    from finetuning.runs.output_folder import lock
    from finetuning.runs.reopen import is_finished, open_run_folder
    from finetuning.runs.terminal import make_console
    from finetuning.training.signals import Stop

    stop = Stop()
    stop.listen()
    console = make_console(quiet=os.environ.get("RANK", "0") != "0")
    run = prepare(options, script, console)
    folder = open_run_folder(
        run.recipe, run.examples.fingerprint, None if options.check else run.strategy
    )
    if finished := is_finished(folder, run.recipe):
        report_finished(run, folder, finished, options, console)
        return
    with nullcontext() if console.quiet else lock(folder):
        describe(run, options, console)
        if options.check:
            check_only(run, folder, console)
        else:
            start(run, stop, console)


def prepare(options: Namespace, script: str, console: "Console") -> "PreparedRun":
    """Whatever of the recipe is wrong is found here, in seconds: torch is not imported yet."""
    from finetuning.launch.launcher import leave_precision_to_recipe
    from finetuning.launch.software import require_deepspeed
    from finetuning.launch.step_size import step_size
    from finetuning.launch.strategy import launch_environment, requested_strategy
    from finetuning.recipe.recipe import load_recipe
    from finetuning.runs.output_folder import (
        output_folder,
        require_free_or_ours,
        require_local_output,
    )
    from finetuning.runs.reopen import with_real_folder
    from finetuning.training.loggers import require_loggers
    from finetuning.training.prepared_run import prepare_run

    file = Path(options.recipe)
    recipe = load_recipe(options.recipe, options.overrides)
    require_script(recipe, script)
    require_local_output(file, recipe, options.overrides)
    recipe = with_real_folder(recipe, file)
    require_free_or_ours(output_folder(recipe))

    if line := leave_precision_to_recipe():
        console.print(line)
    if options.check:
        os.environ |= launch_environment(options.config_file, options.num_processes)
    strategy = requested_strategy()
    require_deepspeed(strategy)
    step_size(recipe, strategy.processes)
    require_loggers(recipe, output_folder(recipe))
    return prepare_run(recipe, strategy, trains_here=not options.check)


def require_script(recipe: "Recipe", script: str) -> None:
    if recipe.script != script:
        reader = recipe.data.sources[0].reader
        raise UserError(
            f"data.reader: {reader} reads {recipe.rows}, which {recipe.script} trains on, and "
            f"{script} does not"
        )


def script_of(arguments: list[str]) -> str:
    """Which of the two trains the recipe; where it cannot be read src/sft.py, which says why."""
    from finetuning.recipe.recipe import Recipe, load_recipe

    try:
        options = read_arguments(arguments)
        return load_recipe(options.recipe, options.overrides).script
    except UserError:
        return Recipe.script


def report_finished(
    run: "PreparedRun", folder: Path, finished: str, options: Namespace, console: "Console"
) -> None:
    from finetuning.runs.reopen import take_changes

    if not (options.check or console.quiet):
        take_changes(folder, run.recipe)
    console.print(
        f"{folder} is finished ({finished}); to train longer, raise "
        "training.num_train_epochs or max_steps; to train anew, choose another "
        "training.output_dir"
    )


def describe(run: "PreparedRun", options: Namespace, console: "Console") -> None:
    """What became of the rows, and what is not as it was published or has no effect."""
    from finetuning.launch.software import versions
    from finetuning.publishing.provenance import unlike_published
    from finetuning.recipe.without_effect import settings_without_effect
    from finetuning.runs.funnel import print_funnel

    print_funnel(console, run.examples.report)
    for difference in unlike_published(Path(options.recipe), run.examples.fingerprint, versions()):
        console.print(f"not as published: {difference}")
    for line in settings_without_effect(run.recipe):
        console.print(line)


def check_only(run: "PreparedRun", folder: Path, console: "Console") -> None:
    from finetuning.model.quantization import hide_bitsandbytes

    hide_bitsandbytes(run.recipe)
    from finetuning.training.check import check

    unseen = check(run, folder)
    console.print(f"recipe, data and {folder} are right; nothing was trained")
    for line in unseen:
        console.print(f"not looked at: {line}")


def start(run: "PreparedRun", stop: "Stop", console: "Console") -> None:
    from finetuning.model.quantization import hide_bitsandbytes

    hide_bitsandbytes(run.recipe)
    # On a CPU that others use too, threads that spin while they wait for each other cost eight
    # times the seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch and transformers take seconds to import: only now, when recipe and data are known to be
    # right.
    with uncollected():
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


if __name__ == "__main__":  # slurm/sft.sh asks which to launch
    print(script_of(sys.argv[1:]))
