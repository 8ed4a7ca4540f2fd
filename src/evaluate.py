"""Is it better? Trained models asked the same questions, their answers scored and compared.

python src/evaluate.py outputs/dolly_gpt2                    # beside its base model
python src/evaluate.py outputs/dolly_gpt2 outputs/try        # two runs
python src/evaluate.py outputs/dolly_gpt2/checkpoint-1300 outputs/dolly_gpt2
python src/evaluate.py outputs/dolly_gpt2 --data faq.jsonl --reader prompt_response
python src/evaluate.py hub:elith/llm-book-models/chapter05/sft_model --no-base --at-least chrf=30
python src/evaluate.py outputs/dolly_gpt2 --tasks belebele_jpn_Jpan,my_task.yaml --as-is
accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 \\
  src/evaluate.py outputs/dolly_gpt2

A run folder, checkpoint, adapter, recipe or address on the Hub, as src/generate.py takes them. The
questions are those of the first one's evaluation set, or every response of the rows in --data; each
model is asked with its own recipe's prompt, end tokens and generation settings. A run alone is
compared with its base model, several with the first.

Prints the scores with 95 % intervals and the answers that changed most. Writes answers.jsonl and
evaluation.json; the same command resumes where it was killed, and only prints what is done.

--data FILE      other rows, read by --reader NAME
--questions N    how many are asked, always the same ones; all; default 200
--no-base        one run alone, without its base model
--output FOLDER  default: evaluation/ in the first run folder; for a published model ./evaluation
--at-least X=N   exit code 2 where the mean of a score (chrf=30) is lower; can be given again
--verbose        shows what the libraries log and warn of

--tasks NAME,... asks benchmarks of lm-eval instead, or YAML files of its tasks, with the recipe's
prompt, and writes tasks.json and tasks.jsonl. With it go --questions N, the first of each task;
--num-fewshot N examples in front of a question, as turns, or with --fewshot-in-prompt in one with
it; --system TEXT; --as-is, which asks lm-eval's own way too: so one sees what the prompt costs.

Arguments generation.key=value and model.quantization=8bit, 4bit or null change them for all.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.command_line import ArgumentParser, require_section
from finetuning.errors import UserError, did_you_mean
from finetuning.script import run, uncollected

if TYPE_CHECKING:
    from rich.console import Console

    from finetuning.evaluation.asking import Share
    from finetuning.evaluation.named_models import Model
    from finetuning.evaluation.turns import Turn


def main(arguments: list[str]) -> None:
    from finetuning.evaluation.named_models import find_models

    options = read_arguments(arguments)
    is_alone = len(options.runs) == 1
    models, folder = find_models(
        options.runs, options.overrides, is_alone and not options.no_base, options.output
    )
    if options.tasks:
        run_benchmarks(options, models, folder)
    else:
        answer_questions(options, models, folder)


def answer_questions(options: Namespace, models: list["Model"], folder: Path) -> None:
    from finetuning.evaluation.turns import draw

    every = questions_of(options, models[0])
    turns = draw(every, options.questions or 200)
    with processes() as (share, console):
        from finetuning.evaluation.models import evaluate
        from finetuning.evaluation.table import print_changed, print_evaluation

        evaluation = evaluate(models, turns, len(every), folder, share)
        print_changed(console, folder, evaluation)
        print_evaluation(console, evaluation)
        console.print(f"written to {folder}: evaluation.json, answers.jsonl")
    require_scores(evaluation, [model.name for model in models], options.at_least)


def run_benchmarks(options: Namespace, models: list["Model"], folder: Path) -> None:
    from finetuning.evaluation.benchmarks import (
        Benchmarks,
        ask_tasks,
        library_named_evaluate,
        load_tasks,
        require_lm_eval,
    )

    require_lm_eval()
    benchmarks = Benchmarks(
        tasks=tuple(options.tasks.split(",")),
        questions=None if options.questions in (None, "all") else options.questions,
        num_fewshot=options.num_fewshot,
        fewshot_in_prompt=options.fewshot_in_prompt,
        system=options.system,
        as_is=options.as_is,
    )
    with library_named_evaluate(), processes() as (share, console):
        from finetuning.evaluation.task_scores import print_task_scores

        summary = ask_tasks(models, load_tasks(benchmarks), benchmarks, folder, share)
        print_task_scores(console, summary)
        console.print(f"written to {folder}: tasks.json, tasks.jsonl")


@contextmanager
def processes() -> Iterator[tuple["Share", "Console"]]:
    """What this process answers, and where it prints."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sft.py
    # Torch and transformers take seconds to import: only now.
    with uncollected():
        import torch
        from accelerate import PartialState

        from finetuning.evaluation.asking import Share
    from finetuning.runs.terminal import make_console

    state = PartialState(cpu=not torch.cuda.is_available())
    console = make_console(quiet=not state.is_main_process)
    yield Share(state.process_index, state.num_processes), console
    state.destroy_process_group()


def read_arguments(arguments: list[str]) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("arguments", nargs="+")
    parser.add_argument("--data")
    parser.add_argument("--reader")
    parser.add_argument("--questions")
    parser.add_argument("--no-base", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--at-least", action="append", default=[])
    parser.add_argument("--tasks")
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--fewshot-in-prompt", action="store_true")
    parser.add_argument("--system")
    options = parser.read(arguments)
    options.overrides = [each for each in options.arguments if is_override(each)]
    options.runs = [each for each in options.arguments if each not in options.overrides]
    require_section(options.overrides, "generation.*", "model.quantization")
    if not options.runs:
        raise UserError("which model? give a run folder, a recipe or an address on the Hub")
    if twice := [name for name in options.runs if options.runs.count(name) > 1]:
        raise UserError(f"{twice[0]} is named twice")
    if bool(options.data) != bool(options.reader):
        raise UserError("--data and --reader go together: a file of rows, and how they are read")
    if options.questions is not None:
        options.questions = read_number(options.questions)
    options.at_least = dict(map(read_bound, options.at_least))
    require_together(options)
    return options


def require_together(options: Namespace) -> None:
    """Raises UserError for a flag of questions beside --tasks, or the other way round."""
    of_questions = {"--data": options.data, "--at-least": options.at_least}
    of_tasks = {
        "--as-is": options.as_is,
        "--num-fewshot": options.num_fewshot,
        "--fewshot-in-prompt": options.fewshot_in_prompt,
        "--system": options.system,
    }
    for flag, value in of_questions.items() if options.tasks else of_tasks.items():
        if value:
            place = "goes without" if options.tasks else "needs"
            raise UserError(f"{flag} {place} --tasks")
    if (options.num_fewshot or 0) < 0:
        raise UserError(f"--num-fewshot {options.num_fewshot}: expected 0 or more")


def is_override(argument: str) -> bool:
    name, equals, _ = argument.partition("=")
    is_setting = bool(equals) and name.startswith(("generation.", "model."))
    return is_setting and not Path(argument).exists()


def read_number(text: str) -> Any:
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise UserError(f"--questions {text}: expected a number from 1 on, or all")
    return text if text == "all" else int(text)


def read_bound(text: str) -> tuple[str, float]:
    from finetuning.evaluation.scores import SCORES

    name, _, bound = text.partition("=")
    if name not in SCORES:
        names = ", ".join(SCORES)
        hint = did_you_mean(name, SCORES)
        raise UserError(f"--at-least {text}: no score {name}; there are {names}{hint}")
    try:
        return name, float(bound)
    except ValueError:
        raise UserError(f"--at-least {text}: expected a number, as in {name}=30") from None


def questions_of(options: Namespace, model: "Model") -> list["Turn"]:
    """Every response of --data, or of the evaluation set of the model's recipe."""
    from finetuning.data.cache import cache_folder, prepare
    from finetuning.evaluation.turns import turns_of
    from finetuning.model.tokenizer import read_tokenizer

    data = model.recipe.data
    if options.data:
        from finetuning.evaluation.turns import other_rows

        turns = turns_of(other_rows(data, options.data, options.reader))
    elif data.eval is None:
        raise UserError(
            f"{model.name}: data.eval is null, it has no evaluation set; give rows: --data FILE "
            "--reader NAME"
        )
    else:
        evaluation_set = prepare(data, read_tokenizer(str(model.folder)), cache_folder()).eval
        assert evaluation_set is not None
        turns = turns_of(data, evaluation_set.rows.tolist())
    if not turns:
        raise UserError(f"{options.data or model.name}: there is no response in these rows")
    return turns


def require_scores(evaluation: dict[str, Any], names: list[str], bounds: dict[str, float]) -> None:
    """Raises UserError where a model's mean is below its bound."""
    for name in names:
        for score, bound in bounds.items():
            if (mean := evaluation["scores"][name][score]["mean"]) < bound:
                raise UserError(f"{name}: {score} is {mean:.2f}, --at-least asks for {bound:g}")


if __name__ == "__main__":
    run(main, __doc__, when_interrupted="; the same command resumes")
