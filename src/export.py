"""Export a trained model for other programs: run folder -> GGUF file and Ollama Modelfile.

python src/export.py outputs/dolly_gpt2
python src/export.py outputs/dolly_gpt2 --type q8_0
python src/export.py hub:elith/llm-book-models/chapter05/sft_model outputs/exported

Writes model-TYPE.gguf with tokenizer, chat template, end tokens, settings and licence, and a
Modelfile, to the folder export of the run folder, or to the folder named last. An adapter is merged
into its base. GPT-2, BLOOM, Llama, Mistral, Qwen 2 and 3. The file is then loaded in llama.cpp
(package xllamacpp) and asked the recipe's questions; exported.json says whether it answers as the
run folder does.

--format    gguf
--type      f32, f16 (the default) or q8_0; f32 has to answer the same
--unasked   does not load the file to ask it
"""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.command_line import ArgumentParser, require_section
from finetuning.errors import UserError
from finetuning.script import run

if TYPE_CHECKING:
    from rich.console import Console

    from finetuning.inference.agreement import Answer


def main(arguments: list[str]) -> None:
    from finetuning.hub.access import require_hub
    from finetuning.hub.address import PREFIX
    from finetuning.inference.resolve import find_trained_model
    from finetuning.launch.hub_needs import base_needs
    from finetuning.recipe.recipe import load_recipe
    from finetuning.runs.terminal import make_console

    options = read_arguments(arguments)
    folder, recipe_file = find_trained_model(options.run)
    recipe = load_recipe(recipe_file, options.overrides)
    require_hub(base_needs(recipe, folder))
    console = make_console()

    from finetuning.export.exported import compare, export, require_gguf, write_record

    require_gguf()
    if options.target is None and options.run.startswith(PREFIX):
        raise UserError(f"{options.run}: name a folder to write to, behind it")
    target = options.target or folder / "export"
    file = export(folder, recipe, options.type, target)
    console.print(f"written: {file} and {file.with_name('Modelfile')}")
    answers = [] if options.unasked else compare(folder, recipe, file)
    write_record(file, options.type, answers)
    if options.unasked:
        return
    print_comparison(console, answers)
    if options.type == "f32" and not all(answer.is_same for answer in answers):
        raise UserError(f"exported, but llama.cpp answers otherwise; see {target}/exported.json")


def print_comparison(console: "Console", answers: list["Answer"]) -> None:
    """Which answers of the file are not the run folder's, and how many are."""
    if not answers:
        console.print("not asked: llama.cpp is not installed (pip install xllamacpp)")
        return
    for question, ours, theirs in [answer for answer in answers if not answer.is_same]:
        console.print(f"{question}\n  run folder: {ours}\n  llama.cpp:  {theirs}")
    same = sum(answer.is_same for answer in answers)
    console.print(f"{same} of {len(answers)} greedy answers in llama.cpp are the run folder's")


def read_arguments(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("arguments", nargs="*", default=[])
    parser.add_argument("--format", choices=["gguf"], default="gguf")
    parser.add_argument("--type", choices=["f32", "f16", "q8_0"], default="f16")
    parser.add_argument("--unasked", action="store_true")
    options = parser.read(arguments)
    options.overrides = [each for each in options.arguments if "=" in each]
    folders = [Path(each).expanduser() for each in options.arguments if "=" not in each]
    if len(folders) > 1:
        raise UserError(f"expected one folder to write to; found {folders[0]} and {folders[1]}")
    options.target = folders[0] if folders else None
    require_section(options.overrides, "generation.*", "publish.license")
    return options


if __name__ == "__main__":
    run(main, __doc__)
