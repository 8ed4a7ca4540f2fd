"""Row -> a pair of responses to one prompt, of which the first was preferred.

A reader here is as one of readers.py, but returns a Pair. To add a data format, write a reader and
name it in PREFERENCE_READERS.
"""

import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any, NamedTuple

from finetuning.data.readers import text_or_turns
from finetuning.data.row import BadRow, Message, Row, brief, checked_text, message, text
from finetuning.data.row_keys import COLUMN, LABELLED

# Where a turn of hh-rlhf begins.
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


class Pair(NamedTuple):
    """Two ways to continue a conversation, each of which ends with a response."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def read_preference(row: Row) -> Pair:
    """{prompt, chosen, rejected}, each text or turns.

    Without a prompt, it is the turns that chosen and rejected begin with; with one, they may begin
    with it too.
    """
    if "label" in row and "chosen" not in row:
        raise BadRow(f"{COLUMN} label: {LABELLED}")
    chosen, rejected = (text_or_turns(row, name, "assistant") for name in ("chosen", "rejected"))
    if not row.get("prompt"):
        if isinstance(row["chosen"], str):
            raise BadRow("column prompt: expected text or turns, chosen and rejected have no turns")
        return split_pair(chosen, rejected)
    prompt = text_or_turns(row, "prompt", "user")
    return Pair(prompt, without_beginning(chosen, prompt), without_beginning(rejected, prompt))


def read_scored_responses(row: Row) -> Pair:
    """{prompt, responses, scores}: the response of the highest score against that of the lowest."""
    responses, scores = list_in(row, "responses", str), list_in(row, "scores", (int, float))
    if len(responses) != len(scores) or len(scores) < 2:
        raise BadRow(
            f"columns responses and scores: expected as many of both, 2 or more, found "
            f"{len(responses)} and {len(scores)}"
        )
    chosen, rejected = (responses[scores.index(end(scores))] for end in (max, min))
    return Pair(text_or_turns(row, "prompt", "user"), response(chosen), response(rejected))


def read_hh_rlhf(row: Row) -> Pair:
    """{chosen, rejected} of Anthropic's hh-rlhf: texts with `\\n\\nHuman:`, `\\n\\nAssistant:`."""
    return split_pair(turns_in(row, "chosen"), turns_in(row, "rejected"))


PREFERENCE_READERS: dict[str, Callable[[Row], Pair]] = {
    "preference": read_preference,
    "scored_responses": read_scored_responses,
    "hh_rlhf": read_hh_rlhf,
}


def split_pair(chosen: list[Message], rejected: list[Message]) -> Pair:
    """The prompt is what both begin with, short of the last turn of each."""
    turns = zip(chosen[:-1], rejected[:-1], strict=False)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], turns)))
    return Pair(chosen[:common], chosen[common:], rejected[common:])


def without_beginning(turns: list[Message], prompt: list[Message]) -> list[Message]:
    """The turns behind the prompt, where they begin with it."""
    return turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns


def list_in(row: Row, column: str, kind: type | tuple[type, ...]) -> list[Any]:
    values = row.get(column)
    if not isinstance(values, list) or not all(isinstance(each, kind) for each in values):
        raise BadRow(f"column {column}: expected a list, found {brief(values)}")
    return values


def turns_in(row: Row, column: str) -> list[Message]:
    before, *parts = SPEAKER.split(text(row, column))
    if before.strip() or not parts:
        raise BadRow(f"column {column}: expected \\n\\nHuman: first, found {brief(row[column])}")
    return [
        message("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def response(content: str) -> list[Message]:
    return [message("assistant", checked_text(content, "column responses"))]


def require_pair(pair: Pair) -> None:
    """Raises BadRow where the two do not begin and end with responses to one prompt."""
    if not pair.prompt:
        raise BadRow("chosen and rejected do not begin with the same turns: there is no prompt")
    for name, turns in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        for place, turn in (("begins", turns[:1]), ("ends", turns[-1:])):
            found = turn[0]["role"] if turn else "nothing"
            if found != "assistant":
                raise BadRow(f"column {name}: {place} with {found}; expected a response")
