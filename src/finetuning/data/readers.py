"""Row -> messages.

A reader is a function from a row, as the data set has it, to a list of messages in the conversational format of
transformers' chat templates. To add a data format, write one and name it in READERS. What does not fit raises BadRow.
Roles are system, user, context (material a question is about), assistant and tool.
"""

from collections.abc import Callable, Iterator
from typing import Any

from finetuning.data.harry_potter import harry_potter_rows, read_session_record
from finetuning.data.row import BadRow, Message, Row, brief, has, message, text, whole


def read_dolly(row: Row) -> list[Message]:
    """{instruction, context, response} of databricks-dolly-15k; an empty context is left out."""
    return [
        *instruction(row, "instruction", "context"),
        message("assistant", text(row, "response")),
    ]


def read_alpaca(row: Row) -> list[Message]:
    """{instruction, input, output} of Stanford Alpaca; `input` may be empty or absent."""
    return [*instruction(row, "instruction", "input"), message("assistant", text(row, "output"))]


def read_prompt_response(row: Row) -> list[Message]:
    """{prompt, response}; `completion`, TRL's word for the response, is taken too."""
    response = "completion" if "completion" in row and "response" not in row else "response"
    return [message("user", text(row, "prompt")), message("assistant", text(row, response))]


def read_messages(row: Row) -> list[Message]:
    """{messages: [{role, content}, ...]}."""
    return turns(row, ("messages",))


def read_sharegpt(row: Row) -> list[Message]:
    """{conversations: [{from, value}, ...]}, and its spellings in the wild: `conversation`, {role, content}."""
    return turns(row, ("conversations", "conversation"))


# Whose turn it is, as data sets on the Hub say it (FastChat, ShareGPT, OpenAI, xLAM, Llama 3).
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call"),
        "assistant",
    ),
    **dict.fromkeys(
        ("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"
    ),
}


def turns(row: Row, columns: tuple[str, ...]) -> list[Message]:
    """The conversation in the first of the columns that the row has."""
    column = next((name for name in columns if name in row), columns[0])
    conversation = row.get(column)
    if not isinstance(conversation, list) or not conversation:
        raise BadRow(
            f"column {column}: expected a list of turns, found {brief(conversation)}{has(row, column)}"
        )
    return [
        read_turn(turn, f"column {column}, turn {number}")
        for number, turn in enumerate(conversation)
    ]


def read_turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{place}: expected {{from, value}} or {{role, content}}, found {brief(turn)}")
    speaker, content = (
        (turn.get("from"), turn.get("value"))
        if "from" in turn
        else (turn.get("role"), turn.get("content"))
    )
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(f"{place}: unknown role {brief(speaker)}; allowed are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"{place}: expected text, found {brief(content)}")
    return message(role, whole(content, place))


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


def instruction(row: Row, question: str, context: str) -> list[Message]:
    material = text(row, context) if row.get(context) is not None else ""
    asked = [message("user", text(row, question))]
    return [*asked, message("context", material)] if material else asked
