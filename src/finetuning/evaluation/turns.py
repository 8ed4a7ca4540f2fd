"""The turns of the evaluation set: what came before a response, and the response."""

from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from finetuning.data.loading import load_rows
from finetuning.data.preparation import refuse
from finetuning.data.rendering import read_row, trained_turns
from finetuning.data.row import BadRow, Message, Tool
from finetuning.data.section import Data
from finetuning.data.tally import Tally
from finetuning.errors import UserError

Key = tuple[int, int]
SEED = 0


class Turn(NamedTuple):
    """One response of a row."""

    row: int
    number: int
    """of the message in the row's conversation"""
    history: list[Message]
    """as it stands in the row: no answer of the model's own"""
    reference: str
    tools: tuple[Tool, ...] = ()
    """that the assistant may call"""

    @property
    def key(self) -> Key:
        return self.row, self.number


def turns_of(data: Data, rows: Collection[int] | None = None) -> list[Turn]:
    """Every response of these rows, or of all, that would be trained and is a text.

    Not what answers nothing, such as a text of continued pre-training. Raises UserError for a row
    that cannot be read.
    """
    wanted = None if rows is None else {int(row) for row in rows}
    turns: list[Turn] = []
    sources = data.sources
    for row in load_rows(data, Tally()):
        if wanted is not None and row.number not in wanted:
            continue
        try:
            conversation = read_row(row.columns, sources[row.source])
        except BadRow as error:
            refuse(row.place, error, data, Tally())
            continue
        messages, tools = conversation.messages, tuple(conversation.tools)
        for number in trained_turns(messages, "response"):
            # Before the first message there is nothing to ask; a call is no text to compare with.
            if number > 0 and not messages[number].get("tool_calls"):
                reference = messages[number]["content"]
                turns.append(Turn(row.number, number, messages[:number], reference, tools))
    return turns


def draw(turns: list[Turn], questions: int | Literal["all"]) -> list[Turn]:
    """So many of them, the same ones every time; more of them hold all that fewer hold."""
    if questions == "all" or questions >= len(turns):
        return turns
    chosen = np.random.default_rng(SEED).permutation(len(turns))[:questions]
    return [turns[number] for number in sorted(chosen)]


def other_rows(data: Data, path: str, reader: str) -> Data:
    """The rows of another file, written as those of `data` are. Raises UserError."""
    settings = {"path": path, "reader": reader, "template": data.template, "newline": data.newline}
    try:
        return Data.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"--data, --reader: {error.errors()[0]['msg']}") from None
