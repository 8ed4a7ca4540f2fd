"""Ask a trained model: run folder, recipe or checkpoint on the Hub -> answers.

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
from collections.abc import Callable

from finetuning.errors import UserError
from finetuning.script import run

OVERRIDES = ("generation.", "model.quantization=")  # what may differ from training


def main(arguments: list[str]) -> None:
    from finetuning.hub.access import require_hub
    from finetuning.inference.resolve import find_checkpoint
    from finetuning.launch.hub_needs import base_needs
    from finetuning.model.quantization import hide_bitsandbytes
    from finetuning.recipe.recipe import load_recipe

    overrides = [argument for argument in arguments[1:] if re.match(r"[a-z_]+(\.\w+)+=", argument)]
    questions = [argument for argument in arguments[1:] if argument not in overrides]
    if other := [override for override in overrides if not override.startswith(OVERRIDES)]:
        raise UserError(
            f"override {other[0]!r}: after training only generation.* and model.quantization may change"
        )
    folder, recipe_file = find_checkpoint(arguments[0])
    recipe = load_recipe(recipe_file, overrides)
    require_hub(base_needs(recipe, folder))
    if not questions and not sys.stdin.isatty():
        raise UserError(
            "no question; give one, or - to read questions from standard input, one a line"
        )
    if questions == ["-"]:
        questions = [line.rstrip("\n") for line in sys.stdin if line.strip()]

    hide_bitsandbytes(recipe)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sft.py
    from finetuning.inference.answers import load_asker

    asker = load_asker(folder, recipe)
    if questions:
        print(*asker(questions), sep="\n")
    elif sys.stdin.isatty():
        converse(asker)


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
