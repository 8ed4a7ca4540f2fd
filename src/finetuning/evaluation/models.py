"""Trained models, one after another, asked the same questions; a killed call is resumed.

<folder>/unfinished.jsonl   a line that says what is asked of which models, then the answers of each
                            round: {model, answers: [[row, turn, text, ended], ...]}
<folder>/answers.jsonl, evaluation.json   when all are there; see results.py
"""

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.evaluation.asking import Answer, Answers, Share, ask
from finetuning.evaluation.named_models import Model
from finetuning.evaluation.results import (
    answer_lines,
    results_of,
    summary,
    write_answers,
    write_evaluation,
)
from finetuning.evaluation.turns import Turn
from finetuning.evaluation.unfinished import Unfinished, require_same
from finetuning.inference.page import columns_of
from finetuning.runs.folder import EVALUATION, RunFolder

UNFINISHED = "unfinished.jsonl"


def evaluate(
    models: Sequence[Model], turns: Sequence[Turn], of: int, folder: Path, share: Share
) -> dict[str, Any]:
    """Fills the folder and returns what evaluation.json holds, in every process.

    What was evaluated before, as it is asked now, is not evaluated again. Raises UserError where
    the folder holds something else, or no question can be asked.
    """
    head = head_of(models, turns)
    done = share.of_first(RunFolder(folder).evaluation)
    if done is not None:
        require_same(done.get("asked"), head, folder / EVALUATION)
        return done
    unfinished = Unfinished(folder / UNFINISHED)
    rounds = share.of_first(unfinished.begin(head) if share.process == 0 else [])
    answers = answers_of(models, turns, share, known_answers(rounds), unfinished)
    results = results_of(turns, answers)
    if not results.turns:
        raise UserError("no question is short enough for every model")
    evaluation = summary(results, of, asked=head)
    if share.process == 0:
        write_answers(folder, answer_lines(results))
        write_evaluation(folder, evaluation)
        unfinished.end()
    return evaluation


def head_of(models: Sequence[Model], turns: Sequence[Turn]) -> dict[str, Any]:
    text = json.dumps([turn._asdict() for turn in turns], sort_keys=True)
    questions = hashlib.sha256(text.encode()).hexdigest()
    head = {"questions": questions, "models": [model.record() for model in models]}
    known: dict[str, Any] = json.loads(json.dumps(head, default=str))  # as it is read back
    return known


def known_answers(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Answers]:
    """What a killed call has left, by model."""
    answers: dict[str, Answers] = {}
    for line in rounds:
        found = {(row, turn): Answer(text, ended) for row, turn, text, ended in line["answers"]}
        answers.setdefault(line["model"], {}).update(found)
    return answers


def answers_of(
    models: Sequence[Model],
    turns: Sequence[Turn],
    share: Share,
    known: Mapping[str, Answers],
    unfinished: Unfinished,
) -> dict[str, Answers]:
    """Of each model by name, the base models too; one run in memory at a time."""
    found: dict[str, Answers] = {}
    for model in models:
        for column in columns_of(model.name, model.folder, model.recipe, model.has_base):
            keep = keeper(unfinished, column.name)
            with column.as_base():
                known_here = known.get(column.name, {})
                found[column.name] = ask(column.asker, turns, share, known=known_here, keep=keep)
        del column
        gc.collect()
    return found


def keeper(unfinished: Unfinished, model: str) -> Callable[[Answers], None]:
    """What `ask` calls with each round of answers."""

    def keep(answers: Answers) -> None:
        rows = [[*key, answer.text, answer.is_ended] for key, answer in answers.items()]
        unfinished.add({"model": model, "answers": rows})

    return keep
