"""One row -> its messages -> the segments of each example that is made of it."""

from collections.abc import Collection
from itertools import takewhile
from typing import Literal, NamedTuple

from finetuning.data.chat_template import RewritesHistory
from finetuning.data.preferences import PREFERENCE_READERS, require_pair
from finetuning.data.readers import READERS
from finetuning.data.row import BadRow, Message, Record, Row, Tool
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
    rejected: list[Message] | None = None
    """of a pair: the same with the rejected response, `messages` being those with the chosen"""


def read_row(row: Row, source: Source) -> Conversation:
    """The row as its reader understands it, and every column used or accounted for.

    Raises BadRow for a row that does not fit.
    """
    assert source.reader is not None  # Data.check_data
    record = renamed(row, source.columns)
    if source.reader in READERS:
        messages, rejected = with_columns(READERS[source.reader](record), record), None
    else:
        messages, rejected = read_pair(record, source.reader)
    tools = tools_of(record)
    named = {*source.where, *filter(None, source.columns.values())}
    refuse_unread(record, COLUMN, named)
    unused = (record.keys() - record.read - named) | record.unused_inside
    return Conversation(messages, tools, frozenset(unused), rejected)


def read_pair(record: Record, reader: str) -> tuple[list[Message], list[Message]]:
    """The conversation with the chosen and with the rejected response; no other is trained."""
    pair = PREFERENCE_READERS[reader](record)
    require_pair(pair)

    def whole(response: list[Message]) -> list[Message]:
        messages = with_columns([*pair.prompt, *response], record)
        begin = len(messages) - len(response)
        turns = [turn for turn in trained_turns(messages, "response") if turn >= begin]
        return training_only(messages, turns)

    return whole(pair.chosen), whole(pair.rejected)


def renamed(row: Row, columns: dict[str, str | None]) -> Record:
    """The row with the reader's names of its columns."""
    if not columns:
        return Record(row)
    theirs = {name for name in columns.values() if name is not None}
    kept = {name: value for name, value in row.items() if name not in theirs | columns.keys()}
    moved = {ours: row[name] for ours, name in columns.items() if name is not None and name in row}
    return Record({**kept, **moved})


def render_row(
    conversation: Conversation, template: Template, loss_on: str = "response", turns: Turns = None
) -> list[list[Segment]]:
    """The segments of each example that is made of a conversation, at least one; of a pair, those
    of the chosen and of the rejected response.

    Together, where the prompt of every response is the beginning of the text, else one example for
    each response, which ends with it; `loss_on` and `turns` are those of the data section. Raises
    BadRow where the template cannot write it.
    """
    if conversation.rejected is not None:
        return render_pair(conversation, conversation.rejected, template)
    messages, tools = conversation.messages, conversation.tools
    trained = trained_turns(messages, loss_on)
    if turns != "each" or len(trained) < 2:
        try:
            return [template.render(training_only(messages, trained), tools)]
        except RewritesHistory:
            if turns == "together":
                raise
    return [template.render(training_only(messages[: turn + 1], [turn]), tools) for turn in trained]


def render_pair(
    conversation: Conversation, rejected: list[Message], template: Template
) -> list[list[Segment]]:
    """The segments with the chosen and with the rejected response, the same up to the response."""
    both = [
        template.render(messages, conversation.tools)
        for messages in (conversation.messages, rejected)
    ]
    prompts = [list(takewhile(lambda each: not is_trained(each), segments)) for segments in both]
    if prompts[0] != prompts[1]:
        raise BadRow("the template writes the prompt otherwise for chosen than for rejected")
    return both


def is_trained(segment: Segment) -> bool:
    return segment.is_response and segment.is_trained


def flaw_of(conversation: Conversation) -> str | None:
    """Why nothing can be learnt from a pair; None for any other, and for conversations."""
    if conversation.rejected is None:
        return None
    if conversation.messages == conversation.rejected:
        return "equal_responses"
    both = (conversation.messages, conversation.rejected)
    return "empty_response" if any(map(has_empty_response, both)) else None


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
