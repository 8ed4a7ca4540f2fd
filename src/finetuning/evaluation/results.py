"""Answers of one or more models to the same turns -> what evaluation.json and answers.jsonl hold.

evaluation.json  {questions, of, names, scores: {model: {score: {mean, low, high}}},
                  differences: {model: {score: {mean, low, high}}}, each against the first,
                  labels: {labels, accuracy, confusion}, or null, losses, versions, signature, ...}
answers.jsonl    a turn a line: {row, turn, messages, reference,
                  answers: {model: {text, ended, scores}}}
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.evaluation.asking import Answer, Answers
from finetuning.evaluation.intervals import CONFIDENCE, RESAMPLES, SEED, mean_of, paired_difference
from finetuning.evaluation.scores import SCORES, normalised, score, signature
from finetuning.evaluation.turns import Key, Turn
from finetuning.files import write_text
from finetuning.launch.software import versions
from finetuning.runs.folder import ANSWERS, EVALUATION

BASE, TRAINED = "base", "trained"  # the models of a run's own evaluation
MAX_LABELS, EACH_AT_LEAST = 20, 3  # distinct responses, and how often on average, to be labels
OTHER = "(something else)"


@dataclass(frozen=True)
class Results:
    """The answers of every model to the turns that all of them answered."""

    turns: list[Turn]
    answers: dict[str, list[Answer]]
    """of each model, in the order of the turns; the first is what others are compared with"""
    scores: dict[str, list[dict[str, float]]]

    def values(self, model: str, name: str) -> list[float]:
        return [scores[name] for scores in self.scores[model]]


def results_of(turns: Sequence[Turn], answers: Mapping[str, Answers]) -> Results:
    """Without the turns that one of the models did not answer."""
    shared = [turn for turn in turns if all(turn.key in found for found in answers.values())]
    said = {model: [found[turn.key] for turn in shared] for model, found in answers.items()}
    scores = {
        model: [
            score(answer.text, turn.reference, answer.is_ended)
            for turn, answer in zip(shared, found, strict=True)
        ]
        for model, found in said.items()
    }
    return Results(shared, said, scores)


def summary(results: Results, of: int, **more: Any) -> dict[str, Any]:
    """What evaluation.json holds, of at least one answer. `of`: how many questions there are."""
    names = list(results.answers)
    values = {model: {name: results.values(model, name) for name in SCORES} for model in names}
    return {
        "questions": len(results.turns),
        "of": of,
        "names": names,
        "scores": {
            model: {name: mean_of(values[model][name]).record() for name in SCORES}
            for model in names
        },
        "differences": {
            model: {
                name: paired_difference(values[model][name], values[names[0]][name]).record()
                for name in SCORES
            }
            for model in names[1:]
        },
        "labels": labels_of(results),
        "interval": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED},
        "chrf": signature(),
        "versions": versions(),
        **more,
    }


def labels_of(results: Results) -> dict[str, Any] | None:
    """Accuracy and a confusion table where the responses are few and each is there several times.

    {labels, answers, accuracy: {model: percent}, confusion: {model: [[of each label, how often it
    was answered by each of answers]]}}; the same as `exact_match` counts.
    """
    expected = [normalised(turn.reference) for turn in results.turns]
    labels = sorted(set(expected))
    if not 1 < len(labels) <= min(MAX_LABELS, len(expected) // EACH_AT_LEAST):
        return None
    columns = [*labels, OTHER]
    confusion, accuracy = {}, {}
    for model, answers in results.answers.items():
        said = [normalised(answer.text) for answer in answers]
        pairs = zip(expected, (text if text in labels else OTHER for text in said), strict=True)
        counts = Counter(pairs)
        confusion[model] = [[counts[label, answer] for answer in columns] for label in labels]
        accuracy[model] = 100.0 * sum(counts[label, label] for label in labels) / len(expected)
    return {"labels": labels, "answers": columns, "accuracy": accuracy, "confusion": confusion}


def answer_lines(results: Results) -> list[dict[str, Any]]:
    """What answers.jsonl holds."""
    return [
        turn_record(turn)
        | {
            "answers": {
                model: answer_record(found[number]) | {"scores": results.scores[model][number]}
                for model, found in results.answers.items()
            }
        }
        for number, turn in enumerate(results.turns)
    ]


def turn_record(turn: Turn) -> dict[str, Any]:
    return {
        "row": turn.row,
        "turn": turn.number,
        "messages": turn.history,
        "reference": turn.reference,
    }


def answer_record(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "ended": answer.is_ended}


def known_answers(lines: Sequence[Mapping[str, Any]], model: str) -> Answers:
    """The answers of one model in lines of answers.jsonl; those that are damaged are left out."""
    found: dict[Key, Answer] = {}
    for line in lines:
        try:
            answer = line["answers"][model]
            key = int(line["row"]), int(line["turn"])
            found[key] = Answer(str(answer["text"]), bool(answer["ended"]))
        except (KeyError, TypeError, ValueError):
            continue
    return found


def write_answers(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_text(
        folder / ANSWERS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )


def write_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    write_text(folder / EVALUATION, json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
