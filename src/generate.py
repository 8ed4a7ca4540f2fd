"""Ask a trained model: run folder, recipe or published model -> answers.

python src/generate.py outputs/dolly_gpt2 "What is the capital of Japan?"
python src/generate.py recipes/dolly_gpt2.yaml "What is the capital of Japan?" generation.max_new_tokens=20
python src/generate.py outputs/dolly_gpt2 - < questions.txt        # one question a line
python src/generate.py outputs/dolly_gpt2                          # ask in a loop, until an empty line
python src/generate.py outputs/my_lora8bit "Hello" model.quantization=null   # the adapter on the base as it is
python src/generate.py hub:elith/llm-book-models/chapter05/sft_model "What is the capital of Japan?"

A recipe's run folder comes first; where that has no model, the one that the recipe publishes is pulled from the Hub.
Prints the responses only, in order, made with the generation settings of the recipe; arguments generation.key=value
change them. An adapter is put on the base model it was trained on, quantised as it was then; model.quantization=8bit,
4bit or null says otherwise.
"""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable

from finetuning.command_line import ArgumentParser, require_section
from finetuning.errors import UserError
from finetuning.script import run


def main(arguments: list[str]) -> None:
    from finetuning.hub.access import require_hub
    from finetuning.inference.resolve import find_trained_model
    from finetuning.launch.hub_needs import base_needs
    from finetuning.model.quantization import hide_bitsandbytes
    from finetuning.recipe.recipe import load_recipe

    options = read_arguments(arguments)
    folder, recipe_file = find_trained_model(options.run)
    recipe = load_recipe(recipe_file, options.overrides)
    require_hub(base_needs(recipe, folder))
    questions = options.questions
    if not questions and not sys.stdin.isatty():
        raise UserError(
            "no question; give one, or - to read questions from standard input, one a line"
        )
    if questions == ["-"]:
        questions = [line.rstrip("\n") for line in sys.stdin if line.strip()]

    hide_bitsandbytes(recipe)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sft.py
    from finetuning.inference.generation import load_asker

    asker = load_asker(folder, recipe)
    if questions:
        print(*asker(questions), sep="\n")
    elif sys.stdin.isatty():
        converse(asker)


def read_arguments(arguments: list[str]) -> Namespace:
    """run, questions and overrides; what reads like section.key=value is an override."""
    parser = ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("words", nargs="*", default=[])
    options = parser.read(arguments)
    options.overrides = [word for word in options.words if re.match(r"[a-z_]+(\.\w+)+=", word)]
    options.questions = [word for word in options.words if word not in options.overrides]
    require_section(options.overrides, "generation.*", "model.quantization")
    return options


def converse(asker: Callable[[list[str]], list[str]]) -> None:
    """Asks what is typed until an empty line or the end of input."""
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        print(*asker([question]), sep="\n")


if __name__ == "__main__":
    run(main, __doc__)
