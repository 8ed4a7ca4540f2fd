"""Rows, messages, and reading a column of a row."""

from typing import Any, Literal, NotRequired, TypedDict

Row = dict[str, Any]
Role = Literal["system", "user", "context", "assistant", "tool"]
Tool = dict[str, Any]
"""JSON schema of a function that the assistant may call"""


class Message(TypedDict):
    """One turn, with transformers' names for its parts."""

    role: Role
    content: str
    reasoning_content: NotRequired[str]
    """what the assistant thinks before its content"""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """{type: function, function: {name, arguments: {...}}} of each call of the assistant"""
    name: NotRequired[str]
    """of the function that gave a tool's result"""
    tool_call_id: NotRequired[str]
    """of the call that a tool's result belongs to"""
    is_trained: NotRequired[bool]
    """False for a response that is read, but not trained"""


class Record(dict[str, Any]):
    """A row or turn that knows which of its keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()
        self.unused_inside: set[str] = set()
        """keys of its turns that nothing was read of: `messages[].id`"""

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


class BadRow(ValueError):
    """A row does not fit its reader or template. The message says where, and what was found."""


def message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


def text(row: Row, column: str) -> str:
    """The text of a column. Raises BadRow where it is missing, of another type or not Unicode."""
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRow(f"column {column}: expected text, found {brief(value)}{columns(row, column)}")
    return checked_text(value, f"column {column}")


def checked_text(value: str, place: str) -> str:
    """The text, unless it holds a lone surrogate (half a character), which no tokenizer encodes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise BadRow(f"{place}: half a character, {half!r}, at position {error.start}") from None
    return value


def checked_row(row: Any, place: str) -> Row:
    """The row. Raises BadRow where it is no object."""
    if not isinstance(row, dict):
        raise BadRow(f"{place}: expected an object, found {type(row).__name__}")
    return row


def columns(row: Row, missing: str) -> str:
    """What a message about a missing column adds: the columns that the row has."""
    if missing in row:
        return ""
    return f" (the row has {', '.join(map(str, row)) or 'no columns'})"


def brief(value: Any) -> str:
    """A value and its type, at most 40 characters of it, for a message."""
    if value is None:
        return "nothing"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
