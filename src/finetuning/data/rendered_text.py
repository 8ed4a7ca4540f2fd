"""A conversation as a chat template writes it, cut at the borders of each text of a message.

The template writes it once with numbers in place of these texts, which shows where they stand.
"""

import json
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from finetuning.data.row import Message

Span = tuple[int, int]  # (start, end) in the rendered text
MARK = re.compile("\ue000(\\d+)\ue001")  # number of a text, in a rendering without these texts
REPEATED = -1


class Text(NamedTuple):
    """A text of a message."""

    turn: int
    what: str
    """content, reasoning or tool call"""
    text: str


class Piece(NamedTuple):
    """A part of the rendered text: text of a message, or of the template."""

    text: str
    turn: int | None
    """number of the message that it is of; None if it is the template's, REPEATED if it was
    written before (gpt-oss: the name of a called function, in front of its result)"""


class Rendering(NamedTuple):
    """A conversation as text."""

    pieces: list[Piece]
    written: set[tuple[int, str]]
    """(turn, what) of the texts that the template wrote"""
    special: list[Span]
    """the template's special tokens"""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def end_of(self, turn: int, least: int) -> int:
        """Where the last text of a message ends, `least` if that is further."""
        ends = accumulate(len(piece.text) for piece in self.pieces)
        of_turn = (end for end, piece in zip(ends, self.pieces, strict=True) if piece.turn == turn)
        return max([least, *of_turn])


def with_numbers(messages: list[Message]) -> tuple[list[Message], list[Text]]:
    """The messages with numbers in place of their texts, and the texts."""
    texts: list[Text] = []
    numbered: list[Message] = []

    def number(turn: int, what: str, text: str) -> str:
        texts.append(Text(turn, what, text))
        return f"\ue000{len(texts) - 1}\ue001"

    for turn, each in enumerate(messages):
        changed: Message = {**each}
        calls = each.get("tool_calls", [])
        if each["content"] or not calls:
            changed["content"] = number(turn, "content", each["content"])
        if reasoning := each.get("reasoning_content"):
            changed["reasoning_content"] = number(turn, "reasoning", reasoning)
        if calls:
            changed["tool_calls"] = [
                with_name(call, number(turn, "tool call", call["function"]["name"]))
                for call in calls
            ]
        numbered.append(changed)
    return numbered, texts


def with_name(call: dict[str, Any], name: str) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "name": name}}


def forms(text: str) -> Iterator[str]:
    """The text as templates write it: as it is, without white space around it, as JSON."""
    yield from (text, text.strip(), text.rstrip(), text.lstrip())
    yield from (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    yield json.dumps(text, ensure_ascii=False)[1:-1]
