"""Rows, messages, and reading a column of a row."""

from typing import Any, Literal, TypedDict

Row = dict[str, Any]


class Message(TypedDict):
    role: Literal["system", "user", "context", "assistant", "tool"]
    content: str


class BadRow(ValueError):
    """A row does not fit its reader or template; the message names the column and what was found there."""


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRow(f"column {column}: expected text, found {brief(value)}{has(row, column)}")
    return whole(value, f"column {column}")


def whole(words: str, place: str) -> str:
    """The words as they are, unless a character of them is cut in two, which no tokenizer reads: a lone surrogate."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{place}: half a character, {words[error.start]!r}, at position {error.start}"
        ) from None
    return words


def has(row: Row, column: str) -> str:
    return "" if column in row else f" (the row has {', '.join(map(str, row)) or 'no columns'})"


def brief(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
