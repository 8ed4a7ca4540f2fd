"""Commands that a page or the notebook tells people to type, checked without running them."""

import re
import shlex
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from commands import ROOT
from pages import listed_recipes

import compare
import generate
import preview
import publish
import pull
import sft
from finetuning.hub.address import parse_address
from finetuning.launch.devices import GPUS
from finetuning.launch.strategy import launch_environment
from finetuning.recipe.recipe import load_recipe

RECIPES = listed_recipes()
READ = {
    f"src/{script.__name__}.py": script.read_arguments
    for script in (compare, generate, preview, publish, pull, sft)
}
PULLED = "outputs/pulled/"  # what a command of ours pulls


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def check_command(command: str, known_folders: set[str]) -> None:
    """Raises where the command could not be typed.

    A script, recipe, setting, make target or run folder in it is not there.
    """
    words = shlex.split(command)
    if "<" in words:
        words = words[: words.index("<")]
    if re.match(r"[a-z]+=\$\(", words[0]):  # name=$(command)
        words = [words[0].partition("(")[2], *words[1:-1], words[-1].removesuffix(")")]
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        assert {word for word in arguments if "=" not in word} <= make_targets()
    elif program == "accelerate":
        check_launch(arguments)
    elif program == "python":
        check_script(arguments, known_folders)
    elif "--wrap" in arguments:
        check_command(arguments[arguments.index("--wrap") + 1], known_folders)
    elif program == "sbatch" or program.startswith("slurm/"):
        check_job(words)
    else:
        assert words == ["source", ".venv/bin/activate"], f"nothing here checks {command}"


def check_launch(arguments: list[str]) -> None:
    assert arguments.pop(0) == "launch"
    parsed = launch_command_parser().parse_args(arguments)
    assert parsed.config_file is None or (ROOT / parsed.config_file).is_file()
    assert parsed.training_script == "src/sft.py"
    check_script([parsed.training_script, *parsed.training_script_args], set())


def check_job(words: list[str]) -> None:
    """sbatch [options] script [arguments], or script [--check] [options --] [arguments]."""
    at = next(number for number, word in enumerate(words) if word.startswith("slurm/"))
    script, arguments = words[at], words[at + 1 :]
    if "--" in arguments:
        assert at == 0, "options of sbatch stand before the script"
        arguments = arguments[arguments.index("--") + 1 :]
    if arguments[0] == "--check":
        del arguments[0]
    config, recipe, *overrides = arguments
    files = [script, config, *([overrides.pop(0)] if script == "slurm/array.sh" else [])]
    assert all((ROOT / file).is_file() for file in files)
    load_recipe(ROOT / recipe, overrides)


def check_script(words: list[str], known_folders: set[str]) -> None:
    script, *arguments = words
    assert script in READ
    options = READ[script](arguments)
    source = next(word for word in arguments if not word.startswith("--"))
    if script == "src/pull.py":
        assert parse_address(f"{options.repo}/{options.subfolder}").repo == options.repo
        return
    if source.startswith(PULLED):
        source = "recipes/quickstart.yaml"
    if script in ("src/sft.py", "src/preview.py"):
        load_recipe(ROOT / source, options.overrides)
        if script == "src/preview.py":
            launch_environment(options.config_file, options.num_processes)
            assert options.gpu is None or options.gpu in GPUS
        return
    if script == "src/publish.py":
        assert source in known_folders, f"no command makes {source}"
        load_recipe(ROOT / "recipes" / f"{Path(source).name}.yaml", options.overrides)
        return
    if source.startswith("hub:"):
        assert parse_address(source)
        return
    assert source in known_folders or (ROOT / source).is_file(), f"no command makes {source}"
    recipe = ROOT / source if source.endswith(".yaml") else ROOT / "recipes/quickstart.yaml"
    load_recipe(recipe, options.overrides if script == "src/generate.py" else [])


def folders_made() -> set[str]:
    """Run folders of the recipes, and the folders of sweeps."""
    sweeps = {f"outputs/{path.stem}" for path in (ROOT / "slurm").glob("*.txt")}
    return sweeps | {load_recipe(ROOT / "recipes" / name).training.output_dir for name in RECIPES}
