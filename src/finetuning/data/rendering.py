"""One row -> its messages -> the segments of each example that is made of it."""

from typing import Any, NamedTuple

from finetuning.data.readers import READERS
from finetuning.data.row import Message, Row
from finetuning.data.section import Data, Source
from finetuning.data.templates import Segment, Template


class Conversation(NamedTuple):
    """What a row says."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    """JSON schemas of the functions that the assistant may call"""


def read_row(row: Row, source: Source) -> Conversation:
    """The row as its reader understands it. Raises BadRow for a row that does not fit."""
    assert source.reader is not None  # Data.check_data
    return Conversation(READERS[source.reader](row), [])


def render_row(conversation: Conversation, template: Template, data: Data) -> list[list[Segment]]:
    """The segments of each example, at least one. Raises BadRow where the template cannot."""
    return [template.render(conversation.messages)]
