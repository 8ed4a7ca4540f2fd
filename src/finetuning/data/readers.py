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
    Record,
    Role,
    Row,
    brief,
    columns,
    message,
    text,
)
from finetuning.data.row_keys import (
    calls_of,
    is_trained,
    parsed,
    reasoning_of,
    refuse_unread,
    text_of,
    unused,
)

# The roles as data sets on the Hub spell them (FastChat, ShareGPT, OpenAI, xLAM, Llama 3).
SPELLINGS: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": (
        *("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"),
        "function_call",
    ),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
# The keys of a turn: whose it is, and its content.
TURN_KEYS = {"from": "value", "speaker": "text", "role": "content"}
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
    """{prompt, response}; both may be turns, and the response may be TRL's `completion`."""
    response = "completion" if "completion" in row and "response" not in row else "response"
    return [*text_or_turns(row, "prompt", "user"), *text_or_turns(row, response, "assistant")]


def read_messages(row: Row) -> list[Message]:
    """{messages: [{role, content}, ...]}."""
    return read_conversation(row, ("messages",))


def read_sharegpt(row: Row) -> list[Message]:
    """{conversations: [{from, value}, ...]}, also spelled `conversation` and {role, content}."""
    return read_conversation(row, ("conversations", "conversation"))


def read_text(row: Row) -> list[Message]:
    """{text} without a question, for continued pre-training; goes with template `text`."""
    return [message("assistant", text(row, "text"))]


READERS: dict[str, Callable[[Row], list[Message]]] = {
    "dolly": read_dolly,
    "alpaca": read_alpaca,
    "sharegpt": read_sharegpt,
    "messages": read_messages,
    "prompt_response": read_prompt_response,
    "text": read_text,
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


def text_or_turns(row: Row, column: str, role: Role) -> list[Message]:
    """The turns in a column, or the one turn of this role whose text it is."""
    if isinstance(row.get(column), list):
        return read_conversation(row, (column,))
    return [message(role, text(row, column))]


def read_conversation(row: Row, names: tuple[str, ...]) -> list[Message]:
    """The conversation in the first of the named columns that the row has.

    In a csv file it is a text of JSON.
    """
    column = next((name for name in names if name in row), names[0])
    turns = row.get(column)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parsed(turns, f"column {column}")
    if not isinstance(turns, list) or not turns:
        found = f"{brief(turns)}{columns(row, column)}"
        raise BadRow(f"column {column}: expected a list of turns, found {found}")
    records = [turn_record(turn, f"column {column}, turn {n}") for n, turn in enumerate(turns)]
    messages = [read_turn(turn, f"column {column}, turn {n}") for n, turn in enumerate(records)]
    if isinstance(row, Record):
        row.unused_inside |= {f"{column}[].{key}" for turn in records for key in unused(turn)}
    return messages


def turn_record(turn: Any, place: str) -> Record:
    if not isinstance(turn, dict):
        raise BadRow(f"{place}: expected {{from, value}} or {{role, content}}, found {brief(turn)}")
    return Record(turn)


def read_turn(turn: Record, place: str) -> Message:
    """A turn with all that its keys say."""
    key = next((key for key in TURN_KEYS if key in turn), "role")
    speaker, content = turn.get(key), turn.get(TURN_KEYS[key])
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(f"{place}: unknown role {brief(speaker)}; allowed are {', '.join(ROLES)}")
    calls = calls_of(turn, place)
    if not calls and speaker.lower() == "function_call" and looks_like_calls(content):
        calls, content = calls_of(Record({"tool_calls": content}), place), None
    if content is None and calls:
        content = ""
    read = message(role, text_of(content, place))
    add_parts(read, turn, calls, place)
    refuse_unread(turn, f"{place}, key")
    return read


def looks_like_calls(content: Any) -> bool:
    """Whether the content of ShareGPT's function_call is JSON, as it mostly is."""
    return isinstance(content, str) and content.lstrip()[:1] in ("{", "[")


def add_parts(read: Message, turn: Record, calls: list[dict[str, Any]], place: str) -> None:
    """Adds to a message what its turn has beside content. Raises BadRow for another role's."""
    reasoning = reasoning_of(turn, place)
    trained = is_trained(turn, f"{place}, key")
    if read["role"] != "assistant" and (calls or reasoning):
        raise BadRow(f"{place}: tool calls or reasoning of the role {read['role']}")
    if calls:
        read["tool_calls"] = calls
    if reasoning:
        read["reasoning_content"] = reasoning
    if not trained and read["role"] == "assistant":
        read["is_trained"] = False
    if read["role"] == "tool":
        if isinstance(name := turn.get("name"), str):
            read["name"] = name
        if isinstance(call := turn.get("tool_call_id"), str):
            read["tool_call_id"] = call
