"""Commands of the pages and the notebook, read by the parsers that will read them."""

import re
import shlex
from argparse import Namespace
from functools import cache
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from commands import ROOT
from pages import listed_recipes

import chat
import compare
import dpo
import evaluate
import export
import generate
import preview
import publish
import pull
import sft
import sweep
from finetuning.data.readers import READERS
from finetuning.hub.address import parse_address
from finetuning.launch.devices import GPUS
from finetuning.launch.strategy import launch_environment
from finetuning.launch.sweep import read_sweep
from finetuning.recipe.recipe import load_recipe

RECIPES = listed_recipes()
SCRIPTS = {
    f"src/{one.__name__}.py": one
    for one in (
        *(chat, compare, dpo, evaluate, export, generate, preview, publish, pull, sft, sweep),
    )
}
PULLED = "outputs/pulled/recipe.yaml"  # what a command of the pages pulls


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@cache
def run_folders() -> dict[str, Path]:
    """The run folder of each recipe, and the recipe."""
    files = [ROOT / "recipes" / name for name in RECIPES]
    return {load_recipe(file).training.output_dir: file for file in files}


def check_command(command: str) -> None:
    """Raises where a script, recipe, setting, make target or run folder is not there."""
    words = shlex.split(command.partition(" < ")[0])
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    program, *arguments = words
    if program == "make":
        assert {word for word in arguments if "=" not in word} <= make_targets()
    elif program == "accelerate":
        launched = launch_command_parser().parse_args(arguments[1:])
        assert arguments[0] == "launch"
        assert launched.training_script in ("src/sft.py", "src/dpo.py", "src/evaluate.py")
        check_script(launched.training_script, launched.training_script_args)
        processes = launched.num_processes
        launch_environment(launched.config_file, processes and str(processes))
    elif program in ("python", ".venv/bin/python"):
        check_script(arguments[0], arguments[1:])
    elif "--wrap" in arguments:
        check_command(arguments[arguments.index("--wrap") + 1])
    elif program == "sbatch" or program.startswith("slurm/"):
        check_job(words)
    else:
        assert words == ["source", ".venv/bin/activate"], f"nothing here checks {command}"


def check_job(words: list[str]) -> None:
    """sbatch [options] script arguments, or script [--check] [options --] arguments."""
    (script,) = [word for word in words if re.match(r"slurm/\w+\.sh", word)]
    arguments = words[words.index(script) + 1 :]
    if words[0] == script:
        assert "--" in arguments or not arguments[0].startswith("--")
        arguments = arguments[arguments.index("--") + 1 :] if "--" in arguments else arguments
    config, recipe, *overrides = arguments
    if script == "slurm/array.sh":
        assert (ROOT / overrides.pop(0)).is_file()
    assert (ROOT / script).is_file() and (ROOT / config).is_file()
    load_recipe(ROOT / recipe, overrides)


def check_script(script: str, arguments: list[str]) -> None:
    options = SCRIPTS[script].read_arguments(arguments)
    CHECKS[script](options)


def check_recipe(options: Namespace) -> None:
    load_recipe(recipe_of(options.recipe), options.overrides)


def check_preview(options: Namespace) -> None:
    check_recipe(options)
    launch_environment(options.config_file, options.num_processes)
    assert options.gpu is None or options.gpu in GPUS


def check_generate(options: Namespace) -> None:
    load_recipe(recipe_of(options.run), options.overrides)


def check_chat(options: Namespace) -> None:
    assert set(options.runs) <= run_folders().keys() | {"outputs/try"}


def check_publish(options: Namespace) -> None:
    load_recipe(run_folders()[options.run], options.overrides)


def check_pull(options: Namespace) -> None:
    assert parse_address(options.address)


def check_export(options: Namespace) -> None:
    load_recipe(recipe_of(options.run), options.overrides)


def check_compare(options: Namespace) -> None:
    sweeps = {f"outputs/{path.stem}" for path in (ROOT / "slurm").glob("*.txt")}
    assert set(options.folders) <= sweeps | run_folders().keys() | {"outputs/try", "outputs/short"}


def check_evaluate(options: Namespace) -> None:
    runs = [name for name in options.runs if not name.startswith("hub:")]
    assert set(runs) <= run_folders().keys() | {"outputs/try"}
    assert options.reader is None or options.reader in READERS


def check_sweep(options: Namespace) -> None:
    launch_environment(str(ROOT / options.config_file), options.num_processes)
    for overrides in read_sweep(ROOT / options.file, options.overrides).values():
        load_recipe(ROOT / options.recipe, overrides)


CHECKS = {
    "src/sft.py": check_recipe,
    "src/dpo.py": check_recipe,
    "src/preview.py": check_preview,
    "src/generate.py": check_generate,
    "src/chat.py": check_chat,
    "src/publish.py": check_publish,
    "src/pull.py": check_pull,
    "src/compare.py": check_compare,
    "src/evaluate.py": check_evaluate,
    "src/sweep.py": check_sweep,
    "src/export.py": check_export,
}


def recipe_of(source: str) -> Path:
    """The recipe meant by a file, a run folder, or what a command of the pages pulls."""
    if source == PULLED or source.startswith("hub:"):
        assert source == PULLED or parse_address(source)
        return ROOT / "recipes" / "quickstart.yaml"
    return run_folders().get(source, ROOT / source)
