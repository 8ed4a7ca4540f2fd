"""Look before you train: what a recipe will train on, without loading the model.

python src/preview.py recipes/dolly_gpt2.yaml
python src/preview.py recipes/dolly_gpt2.yaml data.max_length=256
python src/preview.py recipes/dolly_gpt2.yaml --gpu t4
python src/preview.py recipes/dolly_gpt2.yaml --gpu l4 --num_processes 8 \\
  --config_file accelerate_configs/zero3.yaml

Shows how many rows are kept and why others are not, some examples with the trained tokens in green,
and a budget: what a process will need of the memory of this machine, or of the GPU that is named;
steps, time and disk. --config_file and --num_processes mean what they mean to accelerate launch.
Says what is wrong with the data: prompts on both sides of the evaluation split, copies, different
answers to one question, empty responses, broken characters. Writes report.html, a page with all of
it and the examples that show it, report.json, token_lengths.png and examples.jsonl to
<training.output_dir>/preview/. The plot's labels are Japanese where the locale is, as with
LANG=ja_JP.UTF-8.
"""

import json
import os
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.command_line import ArgumentParser
from finetuning.errors import UserError
from finetuning.script import run

if TYPE_CHECKING:
    from rich.console import Console

    from finetuning.budget.budget import Budget
    from finetuning.launch.devices import Device
    from finetuning.recipe.recipe import Recipe
    from finetuning.runs.doctor import Finding, Shown
    from finetuning.training.prepared_run import PreparedRun

SHOWN = 3  # examples printed
LOOKED_AT = 20_000  # examples at most that findings are of


def main(arguments: list[str]) -> None:
    from finetuning.launch import devices
    from finetuning.runs.terminal import make_console

    options = read_arguments(arguments)
    gpu = devices.gpu_by_name(options.gpu) if options.gpu is not None else None
    run = prepare(options)
    console = make_console()
    show_rows(run, console)
    show_budget(run, gpu, options, console)


def prepare(options: Namespace) -> "PreparedRun":
    from finetuning.launch.strategy import launch_environment, requested_strategy
    from finetuning.recipe.recipe import load_recipe
    from finetuning.runs.output_folder import (
        output_folder,
        require_free_or_ours,
        require_local_output,
    )
    from finetuning.training.prepared_run import prepare_run

    recipe = load_recipe(options.recipe, options.overrides)
    require_local_output(Path(options.recipe), recipe, options.overrides)
    require_free_or_ours(output_folder(recipe))
    os.environ |= launch_environment(options.config_file, options.num_processes)
    return prepare_run(recipe, requested_strategy(), trains_here=False)


def show_rows(run: "PreparedRun", console: "Console") -> None:
    """On the terminal, and in full in the folder preview."""
    from finetuning.data.examples import sequences_of
    from finetuning.runs.colored_masks import examples_in_order, print_example, split_by_mask
    from finetuning.runs.doctor import Shown, diagnose
    from finetuning.runs.funnel import print_findings, print_funnel
    from finetuning.runs.output_folder import make_folder, output_folder

    prepared = run.examples
    looked_at = [
        Shown(number, row, split, split_by_mask(sequences_of(example)[0], run.tokenizer))
        for number, (split, row, example) in enumerate(
            islice(examples_in_order(prepared.train, prepared.eval), LOOKED_AT)
        )
    ]
    findings = diagnose(looked_at, run.template.end_marks)
    print_funnel(console, prepared.report)
    print_findings(console, findings)
    rejected = ", rejected response red" if run.recipe.data.is_preference else ""
    console.rule(f"examples: prompt grey, response green{rejected}")
    for _, _, example in islice(examples_in_order(prepared.train, prepared.eval), SHOWN):
        print_example(console, example, run.tokenizer)

    folder = make_folder(output_folder(run.recipe) / "preview")
    write_files(folder, run, looked_at, findings)
    console.print(
        f"written to {folder}: report.html, report.json, token_lengths.png, examples.jsonl"
    )


def write_files(
    folder: Path, run: "PreparedRun", looked_at: "list[Shown]", findings: "list[Finding]"
) -> None:
    import numpy as np

    from finetuning.files import write_text
    from finetuning.runs.colored_masks import examples_in_order
    from finetuning.runs.plots import plot_lengths
    from finetuning.runs.report_page import report_page

    prepared = run.examples
    parts = [part for part in (prepared.train, prepared.eval) if part is not None]
    lengths = np.concatenate([part.lengths for part in parts])
    report = json.dumps(prepared.report, indent=2, ensure_ascii=False)
    write_text(folder / "report.json", report + "\n")
    plot_lengths(lengths, run.recipe.data.max_length, folder)
    write_text(folder / "report.html", report_page(prepared.report, lengths, looked_at, findings))
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as stream:
        for split, row, example in examples_in_order(prepared.train, prepared.eval):
            input_ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
            line = {"split": split, "row": row, "input_ids": input_ids, "labels": labels}
            if "chosen" in example:  # tokens of the chosen response's sequence, the first of two
                line["chosen"] = example["chosen"]
            stream.write(json.dumps(line) + "\n")


def show_budget(
    run: "PreparedRun", gpu: "Device | None", options: Namespace, console: "Console"
) -> None:
    from finetuning.budget.savings import enough
    from finetuning.launch import devices
    from finetuning.launch.compatibility import require_compatible
    from finetuning.model.quantization import hide_bitsandbytes
    from finetuning.runs.budget_table import print_budget

    console.rule("budget")
    hide_bitsandbytes(run.recipe)
    # Torch and the model's class take seconds to import: only now, when the rows are on the screen.
    from finetuning.budget.budget import make_budget

    device = gpu or devices.local_device(run.recipe)

    def budget_of(recipe: "Recipe") -> "Budget":
        return make_budget(recipe, run.examples, run.tokenizer, run.strategy, device)

    def fits(changed: "Recipe") -> bool:
        try:
            require_compatible(changed, run.strategy, trains_here=False)
            return budget_of(changed).verdict == "fits"
        except UserError:  # what training would refuse is no advice
            return False

    try:
        budget = budget_of(run.recipe)
    except UserError as error:  # a tokenizer's folder is enough to look at the rows
        if options.gpu or options.config_file or options.num_processes:
            raise
        return console.print(f"no budget: {error}")
    step, advice = budget.step, []
    if budget.verdict != "fits":
        advice = enough(
            run.recipe,
            step.micro_batch,
            step.accumulation,
            fits,
            budget.fits_without_tokens,
        )
    print_budget(console, budget, advice)


def read_arguments(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--gpu")
    parser.add_argument("--config_file")
    parser.add_argument("--num_processes")
    return parser.read(arguments)


if __name__ == "__main__":
    run(main, __doc__)
