"""Row -> messages.

A reader is a function from a row, as the data set has it, to a list of messages in the
conversational format of transformers' chat templates. Roles are system, user, context (material
that a question is about), assistant and tool. A reader raises BadRow for a row that does not fit.
To add a data format, write a reader and name it in READERS.
"""

from collections.abc import Callable, Iterator
from typing import Any

from finetuning.data.harry_potter import harry_potter_rows, read_session_record
from finetuning.data.row import (
    BadRow,
    Message,
    Role,
    Row,
    brief,
    checked_text,
    columns,
    message,
    text,
)

# The roles as data sets on the Hub spell them (FastChat, ShareGPT, OpenAI, xLAM, Llama 3).
SPELLINGS: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": (
        *("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"),
        "function_call",
    ),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
ROLES: dict[str, Role] = {name: role for role, names in SPELLINGS.items() for name in names}


def read_dolly(row: Row) -> list[Message]:
    """{instruction, context, response} of databricks-dolly-15k; an empty context is left out."""
    question = question_with_context(row, "instruction", "context")
    return [*question, message("assistant", text(row, "response"))]


def read_alpaca(row: Row) -> list[Message]:
    """{instruction, input, output} of Stanford Alpaca; `input` may be empty or absent."""
    question = question_with_context(row, "instruction", "input")
    return [*question, message("assistant", text(row, "output"))]


def read_prompt_response(row: Row) -> list[Message]:
    """{prompt, response}; `completion`, TRL's name of the response, is read too."""
    response = "completion" if "completion" in row and "response" not in row else "response"
    return [message("user", text(row, "prompt")), message("assistant", text(row, response))]


def read_messages(row: Row) -> list[Message]:
    """{messages: [{role, content}, ...]}."""
    return read_conversation(row, ("messages",))


def read_sharegpt(row: Row) -> list[Message]:
    """{conversations: [{from, value}, ...]}, also spelled `conversation` and {role, content}."""
    return read_conversation(row, ("conversations", "conversation"))


READERS: dict[str, Callable[[Row], list[Message]]] = {
    "dolly": read_dolly,
    "alpaca": read_alpaca,
    "sharegpt": read_sharegpt,
    "messages": read_messages,
    "prompt_response": read_prompt_response,
    "harry_potter": read_session_record,
}
# Formats whose file is not a list of rows: (the file's JSON, data.sessions) -> rows.
FILE_READERS: dict[str, Callable[[Any, int | None], Iterator[Row]]] = {
    "harry_potter": harry_potter_rows
}


def question_with_context(row: Row, question: str, context: str) -> list[Message]:
    """The user's message, and the context message unless that column is empty or absent."""
    material = text(row, context) if row.get(context) is not None else ""
    asked = [message("user", text(row, question))]
    return [*asked, message("context", material)] if material else asked


def read_conversation(row: Row, names: tuple[str, ...]) -> list[Message]:
    """The conversation in the first of the named columns that the row has."""
    column = next((name for name in names if name in row), names[0])
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        found = f"{brief(turns)}{columns(row, column)}"
        raise BadRow(f"column {column}: expected a list of turns, found {found}")
    return [read_turn(turn, f"column {column}, turn {n}") for n, turn in enumerate(turns)]


def read_turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{place}: expected {{from, value}} or {{role, content}}, found {brief(turn)}")
    names = ("from", "value") if "from" in turn else ("role", "content")
    speaker, content = (turn.get(name) for name in names)
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(f"{place}: unknown role {brief(speaker)}; allowed are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"{place}: expected text, found {brief(content)}")
    return message(role, checked_text(content, place))
