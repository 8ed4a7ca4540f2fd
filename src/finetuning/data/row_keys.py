"""The keys of rows and turns that mean something, beside the text that a reader reads.

Each is used, or refuses its row by name, unless it is empty. Everything else that no reader reads
is named in the report as not used.
"""

import json
from collections.abc import Collection, Iterator
from typing import Any, cast

from finetuning.data.row import BadRow, Message, Record, Tool, brief, checked_text, message

TEXT_ONLY = "what is trained on is text"
PREFERENCE = (
    "it belongs to preference data, of which not every response is a good one: see data.reader: "
    "preference and src/dpo.py"
)
LABELLED = (
    "it says which responses are good, as KTO wants it, which is not supported (see "
    "docs/preferences.md); data.where: {label: true} trains on those"
)
REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), TEXT_ONLY),
    **dict.fromkeys(("image_url", "image_urls", "audio_url", "video_url"), TEXT_ONLY),
    **dict.fromkeys(("chosen", "rejected"), PREFERENCE),
    "label": LABELLED,
}
TOOLS = ("tools", "functions")
SYSTEM = ("system", "system_prompt")
REASONING = ("reasoning_content", "thinking", "reasoning")
TRAINED = ("weight", "train", "loss")
COLUMN = "column"  # the place of a key that is one


def refuse_unread(record: Record, place: str, named: Collection[str] = ()) -> None:
    """Raises BadRow for a key that means something, is not empty and was not read.

    `named` are keys that the recipe names otherwise.
    """
    for key in record.keys() & REFUSED.keys() - record.read - {*named}:
        if not is_empty(record[key]):
            raise BadRow(f"{place} {key}: {REFUSED[key]}{way_out(place, key)}")


def unused(record: Record) -> set[str]:
    """The keys that say something and that nothing was read of."""
    return {key for key in record.keys() - record.read if not is_empty(dict.get(record, key))}


def way_out(place: str, key: str) -> str:
    return f"; data.columns: {{{key}: null}} leaves it out" if place == COLUMN else ""


def is_empty(value: Any) -> bool:
    """Nothing, or a text, list or object without anything; False and 0 say something."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def first_of(record: Record, names: Collection[str]) -> tuple[str, Any]:
    """The first of these keys that is not empty, and its value; all of them count as read."""
    record.read.update(names)
    for name in names:
        if name in record and not is_empty(record[name]):
            return name, record[name]
    return "", None


def is_trained(record: Record, place: str) -> bool:
    """What `weight`, `train` or `loss` say. Raises BadRow for weights other than 0 and 1."""
    name, value = first_of(record, TRAINED)
    if name and value not in (0, 1):
        found = f"expected 0 or 1, found {brief(value)}"
        raise BadRow(f"{place} {name}: {found}{way_out(place, name)}")
    return not name or bool(value)


def tools_of(record: Record) -> list[Tool]:
    """The functions that may be called, in transformers' form."""
    name, value = first_of(record, TOOLS)
    tools = parsed(value, f"column {name}") if name else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"column {name}: expected a list of JSON schemas, found {brief(tools)}")
    tools = [without_nothing(tool) for tool in tools]
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def calls_of(record: Record, place: str) -> list[dict[str, Any]]:
    """The calls in `tool_calls`, or in OpenAI's older `function_call`."""
    name, value = first_of(record, ("tool_calls", "function_call"))
    if not name:
        return []
    calls = parsed(value, f"{place}, {name}")
    each = calls if isinstance(calls, list) else [calls]
    return [call_of(call, f"{place}, {name}") for call in each]


def call_of(value: Any, place: str) -> dict[str, Any]:
    """{name, arguments}, also below `function`, in transformers' form: arguments are an object."""
    call = without_nothing(value) if isinstance(value, dict) else {}
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise BadRow(f"{place}: expected {{name, arguments}}, found {brief(value)}")
    arguments = parsed(function.get("arguments") or {}, f"{place}, arguments")
    if not isinstance(arguments, dict):
        raise BadRow(f"{place}, arguments: expected an object, found {brief(arguments)}")
    identity = {"id": call["id"]} if "id" in call else {}
    return {
        **identity,
        "type": "function",
        "function": {"name": checked_text(name, place), "arguments": arguments},
    }


def parsed(value: Any, place: str) -> Any:
    """The value of a text of JSON, and any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{place}: expected JSON, found {brief(value)}") from None


def without_nothing(value: Any) -> Any:
    """The same without keys that have no value: tables fill every row with the keys of all."""
    if isinstance(value, dict):
        return {key: without_nothing(each) for key, each in value.items() if each is not None}
    return [without_nothing(each) for each in value] if isinstance(value, list) else value


def reasoning_of(record: Record, place: str) -> str:
    name, value = first_of(record, REASONING)
    if name and not isinstance(value, str):
        raise BadRow(f"{place}, {name}: expected text, found {brief(value)}")
    return checked_text(value, f"{place}, {name}") if name else ""


def text_of(content: Any, place: str) -> str:
    """A content that is text, or a list of parts of text."""
    if isinstance(content, list):
        content = "".join(part_text(part, place) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"{place}: expected text, found {brief(content)}")
    return checked_text(content, place)


def part_text(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"{place}: expected text or {{type: text, text}}, found {brief(part)}")
    return cast("str", part["text"])


def with_columns(messages: list[Message], record: Record) -> list[Message]:
    """The messages with what columns beside them say: system, history, reasoning, weight."""
    first = list(history_of(record))
    name, system = first_of(record, SYSTEM)
    if name and messages[0]["role"] == "system":
        raise BadRow(f"column {name}: the conversation begins with a system turn of its own")
    if name:
        first.insert(0, message("system", text_of(system, f"column {name}")))
    messages = with_reasoning([*first, *messages], record)
    if is_trained(record, COLUMN):
        return messages
    return [{**turn, "is_trained": False} for turn in messages]


def history_of(record: Record) -> Iterator[Message]:
    """Earlier turns: a column `history` of [question, answer] pairs."""
    _, value = first_of(record, ("history",))
    pairs = parsed(value, "column history") if value else []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        place = f"column history, {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"{place}: expected [question, answer], found {brief(pair)}")
        yield message("user", text_of(pair[0], place))
        yield message("assistant", text_of(pair[1], place))


def with_reasoning(messages: list[Message], record: Record) -> list[Message]:
    """The last response with the thought of a column beside it."""
    thought = reasoning_of(record, COLUMN)
    if not thought:
        return messages
    if messages[-1]["role"] != "assistant" or "reasoning_content" in messages[-1]:
        raise BadRow("column reasoning: it does not belong to the last response")
    return [*messages[:-1], {**messages[-1], "reasoning_content": thought}]
