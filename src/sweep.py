"""One recipe many times: each line of a text file has the overrides of one run.

python src/sweep.py accelerate_configs/single_gpu.yaml recipes/dolly_gpt2.yaml seeds.txt
python src/sweep.py --check accelerate_configs/cpu.yaml recipes/quickstart.yaml seeds.txt
python src/sweep.py --at-once 4 accelerate_configs/single_gpu.yaml recipes/dolly_gpt2.yaml seeds.txt

Line N is trained into outputs/<name of the file>/N, one line after another or --at-once several,
each then with a GPU of its own. Arguments after the file are overrides of every run. Empty lines
and comments (#) do not count; words are quoted as in a shell. The same command resumes: what is
finished is left as it is. After the last run src/compare.py prints the table. --check asks of each
line what src/sft.py --check asks, and trains nothing. On a Slurm cluster: slurm/array.sh.
"""

import os
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from finetuning.command_line import ArgumentParser
from finetuning.errors import UserError
from finetuning.script import run

SOURCE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    from finetuning.launch.sweep import read_sweep

    options = read_arguments(arguments)
    runs = read_sweep(Path(options.file), options.overrides)
    if options.check:
        return check(options, runs)
    gpus: SimpleQueue[str | None] = SimpleQueue()
    for number in range(options.at_once):
        gpus.put(None if options.at_once == 1 else str(number))

    def train(name: str) -> bool:
        gpu = gpus.get()
        try:
            return is_trained(name, options, runs[name], gpu)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(options.at_once) as threads:
        done = dict(zip(runs, threads.map(train, runs), strict=True))
    folder = Path("outputs") / Path(options.file).stem
    subprocess.run([sys.executable, str(SOURCE / "compare.py"), str(folder)], check=False)
    if failed := [name for name, is_done in done.items() if not is_done]:
        raise UserError(f"{options.file}: not finished: line {', '.join(failed)}; see above")


def check(options: Namespace, runs: dict[str, list[str]]) -> None:
    """Every line in one process, so that libraries and rows are read once."""
    from finetuning.recipe.recipe import load_recipe
    from finetuning.training_script import read_arguments as read_training
    from finetuning.training_script import train_recipe

    script = load_recipe(options.recipe).script
    launch = ["--check", "--config_file", options.config_file]
    if options.num_processes is not None:
        launch += ["--num_processes", options.num_processes]
    for name, overrides in runs.items():
        print(f"== line {name}: {' '.join(overrides)}", flush=True)
        try:
            train_recipe(read_training([*launch, options.recipe, *overrides]), script)
        except UserError as error:
            raise UserError(f"line {name} of {options.file}: {error}") from None


def is_trained(name: str, options: Namespace, overrides: list[str], gpu: str | None) -> bool:
    """Trains one line; whether it is finished."""
    from finetuning.recipe.recipe import load_recipe

    launch = ["accelerate.commands.launch", "--config_file", options.config_file]
    if options.num_processes is not None:
        launch += ["--num_processes", options.num_processes]
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    print(f"== line {name}: {' '.join(overrides)}", flush=True)
    script = SOURCE.parent / load_recipe(options.recipe).script
    command = [sys.executable, "-m", *launch, str(script), options.recipe, *overrides]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def read_arguments(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("config_file")
    parser.add_argument("recipe")
    parser.add_argument("file")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--num_processes")
    return parser.read(arguments)


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command resumes the sweep")
