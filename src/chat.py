"""A page to talk to a trained model, beside its base model or other runs.

python src/chat.py outputs/dolly_gpt2                   # beside the base model
python src/chat.py outputs/dolly_gpt2 outputs/try       # two runs
python src/chat.py outputs/dolly_gpt2/checkpoint-1300 outputs/dolly_gpt2 --port 8000
python src/chat.py hub:elith/llm-book-models/chapter05/sft_model --no-base

Prints the address of a page; open it in a browser. Every model is asked the same question, answers
appear word by word, and below each stands what the model reads, the tokens that are trained in
green. The page starts with the generation settings of the first recipe. Ctrl-C ends it.

--no-base    one run alone, without its base model
--port N     default 7860; 0 takes a free one
--host NAME  default 127.0.0.1: only this machine; 0.0.0.0 lets everyone in who can reach it
--verbose    shows what the libraries log and warn of
"""

import os
import threading
from argparse import Namespace
from contextlib import suppress

from finetuning.command_line import ArgumentParser, require_section
from finetuning.script import run, uncollected


def main(arguments: list[str]) -> None:
    from finetuning.hub.access import require_hub
    from finetuning.inference.resolve import find_trained_model
    from finetuning.launch.hub_needs import base_needs
    from finetuning.model.quantization import hide_bitsandbytes
    from finetuning.recipe.recipe import load_recipe

    options = read_arguments(arguments)
    runs = []
    for name in options.runs:
        folder, recipe_file = find_trained_model(name)
        recipe = load_recipe(recipe_file, options.overrides)
        require_hub(base_needs(recipe, folder))
        runs.append((name, folder, recipe))
    quantized = [recipe for _, _, recipe in runs if recipe.model.quantization]
    hide_bitsandbytes(quantized[0] if quantized else recipe)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sft.py
    # Torch and transformers take seconds to import: only now.
    with uncollected():
        from finetuning.inference.page import columns_of, serving

    has_base = len(runs) == 1 and not options.no_base
    columns = [column for each in runs for column in columns_of(*each, has_base)]
    with serving(columns, options.host, options.port) as server, suppress(KeyboardInterrupt):
        print(f"{server.address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def read_arguments(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--no-base", action="store_true")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--host", default="127.0.0.1")
    options = parser.read(arguments)
    options.overrides = [
        each for each in options.runs if each.startswith(("generation.", "model."))
    ]
    options.runs = [each for each in options.runs if each not in options.overrides]
    require_section(options.overrides, "generation.*", "model.quantization")
    return options


if __name__ == "__main__":
    run(main, __doc__)
