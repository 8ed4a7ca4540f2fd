"""Ask a trained model: run folder, checkpoint, recipe or published model -> answers.

python src/generate.py outputs/dolly_gpt2                          # a conversation
python src/generate.py outputs/dolly_gpt2 "What is the capital of Japan?"
python src/generate.py recipes/dolly_gpt2.yaml "Name two colours." generation.max_new_tokens=20
python src/generate.py outputs/dolly_gpt2 - < questions.txt        # one question a line
python src/generate.py outputs/dolly_gpt2 questions.jsonl --output answers.jsonl
python src/generate.py outputs/dolly_gpt2 "Hello" --checkpoint last
python src/generate.py outputs/my_lora8bit "Hello" model.quantization=null   # on the base as it is
python src/generate.py hub:elith/llm-book-models/chapter05/sft_model "What is the capital of Japan?"

A recipe's run folder comes first; where that has no model, the one that the recipe publishes is
pulled from the Hub. outputs/dolly_gpt2/checkpoint-20 asks a checkpoint, of an unfinished run too.
Without a question it is a conversation: what was said is remembered, /new begins another, /system
TEXT one with instructions, /quit ends it. Questions that are given are asked alone, each without
the others; a name that ends in .txt is a file of them, one a line, one that ends in .jsonl has a
JSON object a line, {"prompt": ...} or {"messages": [{"role": ..., "content": ...}, ...]}.

--each          no conversation: each line that is typed is asked alone
--json          JSON Lines out, the question's object with its "answer"; in too from -
--output FILE   JSON Lines into a file; the same command resumes where it was killed
--checkpoint N  the run folder's checkpoint of step N, or last
--verbose       shows what the libraries log and warn of

Prints the answers in order, made with the generation settings of the recipe; arguments
generation.key=value change them. An adapter is put on the base model it was trained on, quantized
as it was then; model.quantization=8bit, 4bit or null says otherwise.
"""

import os
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.command_line import ArgumentParser, require_section
from finetuning.errors import UserError
from finetuning.script import run, uncollected
from finetuning.untrusted_text import printable

if TYPE_CHECKING:
    from finetuning.inference.generation import Asker
    from finetuning.inference.questions import Question
    from finetuning.recipe.recipe import Recipe


def main(arguments: list[str]) -> None:
    from finetuning.hub.access import require_hub
    from finetuning.inference.resolve import find_trained_model
    from finetuning.launch.hub_needs import base_needs
    from finetuning.model.quantization import hide_bitsandbytes
    from finetuning.recipe.recipe import load_recipe

    options = read_arguments(arguments)
    folder, recipe_file = find_trained_model(options.run, options.checkpoint)
    recipe = load_recipe(recipe_file, options.overrides)
    require_hub(base_needs(recipe, folder))
    hide_bitsandbytes(recipe)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sft.py
    if options.questions:
        return answer(options, folder, recipe)
    if not sys.stdin.isatty():
        raise UserError(
            "no question; give one, or - to read questions from standard input, one a line"
        )
    with uncollected():
        from finetuning.inference.conversation import converse
        from finetuning.inference.trained_model import load_asker

    converse(load_asker(folder, recipe), remembers=not options.each)


def read_arguments(arguments: list[str]) -> Namespace:
    """What reads like section.key=value is an override, the other words are questions."""
    parser = ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("words", nargs="*", default=[])
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--checkpoint")
    options = parser.read(arguments)
    options.overrides = [word for word in options.words if re.match(r"[a-z_]+(\.\w+)+=", word)]
    options.questions = [word for word in options.words if word not in options.overrides]
    require_section(options.overrides, "generation.*", "model.quantization")
    if (options.json or options.output) and not options.questions:
        raise UserError("--json and --output are for questions that are given, a file of them or -")
    return options


def answer(options: Namespace, folder: Path, recipe: "Recipe") -> None:
    """Answers to the questions that were given, on standard output or in a file."""
    from finetuning.inference.questions import answer_in_order, as_json, write_answers

    questions = [each for word in options.questions for each in questions_of(word, options.json)]

    def load() -> "Asker":
        # Torch and transformers take seconds to import: only now.
        with uncollected():
            from finetuning.inference.trained_model import load_asker

        return load_asker(folder, recipe)

    if options.output:
        made_with = {
            "model": str(folder),
            "quantization": recipe.model.quantization,
            "generation": recipe.generation.model_dump(),
        }
        write_answers(load, questions, options.output, made_with)
        print(f"written to {options.output}: {len(questions):,} answers")
        return
    answers = answer_in_order(load(), questions)
    for question, words in zip(questions, answers, strict=True):
        # As it is, for other programs; a terminal would act on control characters in it.
        text = as_json(question, words) if options.json else words
        text = printable(text) if sys.stdout.isatty() else text
        print(text, end="" if options.json else None)


def questions_of(word: str, is_json: bool) -> list["Question"]:
    """One question, or those of a file or standard input."""
    from finetuning.inference.questions import plain_question, read_questions

    if word == "-":
        return read_questions(sys.stdin.buffer.read(), "standard input", is_json)
    file = Path(word)
    if file.suffix in (".txt", ".jsonl") and (file.is_file() or " " not in word):
        try:
            return read_questions(file.read_bytes(), word, file.suffix == ".jsonl")
        except OSError as error:
            raise UserError(f"{word}: cannot be read: {error.strerror}") from None
    if not word.strip():
        raise UserError("a question is empty")
    return [plain_question(word)]


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command resumes a file of answers")
