"""The forms in which chat templates want messages, and messages that find out which."""

import json
from typing import Any, NamedTuple

from finetuning.data.row import Message, Tool, message

PLACEHOLDER = "\ue000\ue001"  # text whose place in a rendering is looked for

QUESTION = message("user", "a")
CALLS: list[dict[str, Any]] = [
    {
        "id": "call00000",
        "type": "function",
        "function": {"name": PLACEHOLDER, "arguments": {"a": "b"}},
    }
]
TOOLS: list[Tool] = [
    {
        "type": "function",
        "function": {
            "name": PLACEHOLDER,
            "description": "a",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string", "description": "b"}},
                "required": ["a"],
            },
        },
    }
]


class CallForm(NamedTuple):
    """How a chat template wants tool calls."""

    content: str | None
    """of a message that has calls and no content"""
    has_text_arguments: bool
    """arguments as JSON text (DeepSeek), not as an object"""


def calling() -> Message:
    """A message that calls a function named PLACEHOLDER."""
    return {"role": "assistant", "content": "", "tool_calls": CALLS}


def in_form(turn: Message, form: CallForm | None) -> dict[str, Any]:
    """The message with the keys and forms that a chat template reads."""
    read: dict[str, Any] = {key: value for key, value in turn.items() if key != "is_trained"}
    if not read.get("reasoning_content"):
        read.pop("reasoning_content", None)
    if form and turn.get("tool_calls"):
        read["content"] = turn["content"] or form.content
        if form.has_text_arguments:
            read["tool_calls"] = [with_text_arguments(call) for call in turn["tool_calls"]]
    return read


def with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
