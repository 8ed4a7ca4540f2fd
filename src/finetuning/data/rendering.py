"""One row -> its messages -> the segments of each example that is made of it."""

from collections.abc import Collection
from typing import Literal, NamedTuple

from finetuning.data.chat_template import RewritesHistory
from finetuning.data.readers import READERS
from finetuning.data.row import Message, Record, Row, Tool
from finetuning.data.row_keys import COLUMN, refuse_unread, tools_of, with_columns
from finetuning.data.section import Source
from finetuning.data.templates import Segment, Template

Turns = Literal["together", "each"] | None


class Conversation(NamedTuple):
    """What a row says."""

    messages: list[Message]
    tools: list[Tool]
    """that the assistant may call"""
    unused: frozenset[str] = frozenset()
    """columns, and keys of turns, that nothing was read of"""


def read_row(row: Row, source: Source) -> Conversation:
    """The row as its reader understands it, and every column used or accounted for.

    Raises BadRow for a row that does not fit.
    """
    assert source.reader is not None  # Data.check_data
    record = renamed(row, source.columns)
    messages = with_columns(READERS[source.reader](record), record)
    tools = tools_of(record)
    named = {*source.where, *filter(None, source.columns.values())}
    refuse_unread(record, COLUMN, named)
    unused = (record.keys() - record.read - named) | record.unused_inside
    return Conversation(messages, tools, frozenset(unused))


def renamed(row: Row, columns: dict[str, str | None]) -> Record:
    """The row with the reader's names of its columns."""
    theirs = {name for name in columns.values() if name is not None}
    kept = {name: value for name, value in row.items() if name not in theirs | columns.keys()}
    moved = {ours: row[name] for ours, name in columns.items() if name is not None and name in row}
    return Record({**kept, **moved})


def render_row(
    conversation: Conversation, template: Template, loss_on: str = "response", turns: Turns = None
) -> list[list[Segment]]:
    """The segments of each example that is made of a conversation, at least one.

    Together, where the prompt of every response is the beginning of the text, else one example for
    each response, which ends with it; `loss_on` and `turns` are those of the data section. Raises
    BadRow where the template cannot write it.
    """
    messages, tools = conversation.messages, conversation.tools
    trained = trained_turns(messages, loss_on)
    if turns != "each" or len(trained) < 2:
        try:
            return [template.render(training_only(messages, trained), tools)]
        except RewritesHistory:
            if turns == "together":
                raise
    return [template.render(training_only(messages[: turn + 1], [turn]), tools) for turn in trained]


def trained_turns(messages: list[Message], loss_on: str) -> list[int]:
    """The numbers of the responses that are trained.

    Of `all` tokens too, where it does not matter which turn they are of.
    """
    turns = [
        number
        for number, turn in enumerate(messages)
        if turn["role"] == "assistant" and turn.get("is_trained", True)
    ]
    return turns if loss_on == "response" else turns[-1:]


def has_empty_response(messages: list[Message]) -> bool:
    """Whether a response that may be trained has no text: it trains a bare end mark."""
    return any(
        turn["role"] == "assistant"
        and turn.get("is_trained", True)
        and not (turn["content"].strip() or turn.get("tool_calls"))
        for turn in messages
    )


def training_only(messages: list[Message], turns: Collection[int]) -> list[Message]:
    """The messages, of whose responses only these are trained."""
    return [
        {**turn, "is_trained": number in turns} if turn["role"] == "assistant" else turn
        for number, turn in enumerate(messages)
    ]
