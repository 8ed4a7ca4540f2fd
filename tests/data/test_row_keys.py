"""Every key of a row is used, refuses the row by its name, or is named as not used."""

import json
import re

import pytest
from tiny import byte_level

from finetuning.data.chosen_template import load_template
from finetuning.data.rendering import Conversation, read_row, render_row
from finetuning.data.row import BadRow
from finetuning.data.section import Data, Source

TOKENIZER = byte_level()
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {
    "name": "weather",
    "description": "Tells it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyoto"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def read(row, reader="messages", **settings):
    return read_row(row, Source(path="a", reader=reader, **settings))


def messages(*turns, **columns):
    return {"messages": list(turns), **columns}


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Kyoto"}}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Kyoto"}'}}]},
        {"function_call": {"name": "weather", "arguments": '{"city": "Kyoto"}'}},
        # What a table makes of rows with other arguments.
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Kyoto", "day": None}}]},
    ],
)
def test_a_call_is_read_in_every_spelling(calls, content):
    found = read(messages(USER, {"role": "assistant", **content, **calls}))
    assert found.messages == [USER, CALLING]


def test_a_call_keeps_its_id_and_a_result_its_function():
    result = {"role": "tool", "content": "17", "tool_call_id": "c1", "name": "weather"}
    calling = {**CALLING, "tool_calls": [{"id": "c1", **CALL}]}
    assert read(messages(USER, calling, result)).messages == [USER, calling, result]


def test_the_call_of_a_sharegpt_row_is_a_call_and_its_tools_are_tools():
    row = {
        "system": "s",
        "tools": json.dumps([FUNCTION]),
        "conversations": [
            {"from": "human", "value": "q"},
            {
                "from": "function_call",
                "value": '{"name": "weather", "arguments": {"city": "Kyoto"}}',
            },
            {"from": "observation", "value": "17"},
            {"from": "gpt", "value": "a"},
        ],
    }
    system, tool = {"role": "system", "content": "s"}, {"role": "tool", "content": "17"}
    assert read(row, "sharegpt") == Conversation([system, USER, CALLING, tool, ASSISTANT], [TOOL])


@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize("tools", [[TOOL], [FUNCTION], json.dumps([TOOL])])
def test_tools_are_read_in_every_spelling(column, tools):
    assert read(messages(USER, ASSISTANT, **{column: tools})).tools == [TOOL]


def test_tools_lose_the_keys_that_a_table_fills_in():
    filled = {**FUNCTION, "strict": None, "parameters": {**FUNCTION["parameters"], "items": None}}
    assert read(messages(USER, ASSISTANT, tools=[filled])).tools == [TOOL]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_read_in_every_spelling(key):
    thinking = {**ASSISTANT, "reasoning_content": "why"}
    assert read(messages(USER, {**ASSISTANT, key: "why"})).messages == [USER, thinking]
    row = {"prompt": "q", "response": "a", key: "why"}
    assert read(row, "prompt_response").messages == [USER, thinking]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("value", [0, 0.0, False])
def test_a_turn_or_row_that_is_not_to_be_trained_is_not(key, value):
    [_, turn] = read(messages(USER, {**ASSISTANT, key: value})).messages
    assert turn == {**ASSISTANT, "is_trained": False}
    [_, turn] = read(messages(USER, ASSISTANT, **{key: value})).messages
    assert turn["is_trained"] is False
    data = Data(path="a", reader="messages", template="plain_chat")
    template = load_template(data, TOKENIZER)
    [segments] = render_row(read(messages(USER, {**ASSISTANT, key: value})), template, data)
    assert not any(segment.is_response and segment.is_trained for segment in segments)


@pytest.mark.parametrize("value", [1, 1.0, True, None])
def test_a_turn_of_full_weight_is_trained(value):
    assert read(messages(USER, {**ASSISTANT, "weight": value})).messages == [USER, ASSISTANT]


def test_system_and_history_are_turns_in_front():
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"]]}
    assert read(row, "alpaca").messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        USER,
        ASSISTANT,
    ]


@pytest.mark.parametrize("empty", [None, "", [], {}])
@pytest.mark.parametrize("key", ["system", "history", "tools", "images", "chosen", "label"])
def test_a_key_without_a_value_says_nothing(key, empty):
    assert read(messages(USER, ASSISTANT, **{key: empty})).messages == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (messages(USER, ASSISTANT, images=["a.png"]), "column images: what is trained on is text"),
        (messages(USER, ASSISTANT, videos=["a"]), "column videos: what is trained on is text"),
        (messages(USER, ASSISTANT, audio="a.wav"), "column audio: what is trained on is text"),
        (messages(USER, ASSISTANT, image_url="a"), "column image_url: what is trained on is text"),
        (messages(USER, ASSISTANT, chosen="a"), "column chosen: it belongs to preference data"),
        (
            messages(USER, ASSISTANT, label=False),
            "column label: it says which responses are good, as KTO wants it, which is not",
        ),
        (
            messages({**USER, "images": ["a"]}, ASSISTANT),
            "column messages, turn 0, key images: what is trained on is text",
        ),
        (
            messages(USER, {**ASSISTANT, "weight": 0.5}),
            "column messages, turn 1, key weight: expected 0 or 1, found float 0.5",
        ),
        (messages(USER, ASSISTANT, weight=2), "column weight: expected 0 or 1, found int 2"),
        (
            messages({**USER, "thinking": "why"}, ASSISTANT),
            "column messages, turn 0: tool calls or reasoning of the role user",
        ),
        (
            messages({**USER, "content": [{"type": "image_url", "image_url": "a"}]}, ASSISTANT),
            "column messages, turn 0: expected text or {type: text, text}",
        ),
        (
            messages(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}),
            "column messages, turn 1, tool_calls, arguments: expected JSON, found str 'x'",
        ),
        (
            messages(USER, {"role": "assistant", "tool_calls": ["f"]}),
            "column messages, turn 1, tool_calls: expected {name, arguments}, found str 'f'",
        ),
        (messages(USER, ASSISTANT, tools="f"), "column tools: expected JSON, found str 'f'"),
        (
            messages(USER, ASSISTANT, history=["q"]),
            "column history, 0: expected [question, answer]",
        ),
        (
            messages({"role": "system", "content": "s"}, USER, ASSISTANT, system="t"),
            "column system: the conversation begins with a system turn of its own",
        ),
    ],
)
def test_a_key_that_cannot_be_used_refuses_the_row_by_its_name(row, complaint):
    with pytest.raises(BadRow, match=f"^{re.escape(complaint)}"):
        read(row)


@pytest.mark.parametrize("settings", [{"where": {"label": True}}, {"columns": {"label": None}}])
def test_a_column_that_the_recipe_names_refuses_nothing(settings):
    found = read(messages(USER, ASSISTANT, label=True), **settings)
    assert (found.messages, found.unused) == ([USER, ASSISTANT], frozenset())


def test_keys_of_turns_that_nothing_reads_are_named_with_their_column():
    turns = [{**USER, "id": 3, "name": "Ann"}, {**ASSISTANT, "score": 0, "lang": None, "tags": []}]
    row = messages(*turns, source="x")
    assert read(row).unused == {"source", "messages[].id", "messages[].name", "messages[].score"}
    asked = [{"content": "q", "role": "user", "lang": "en"}]
    found = read({"prompt": asked, "completion": "a"}, "prompt_response")
    assert found.unused == {"prompt[].lang"}


def test_columns_that_nothing_reads_are_named():
    row = {"instruction": "q", "context": "", "response": "a", "category": "qa", "id": 7}
    assert read(row, "dolly").unused == {"category", "id"}


def test_columns_may_have_other_names():
    names = {"instruction": "question", "response": "answer"}
    row = {"question": "q", "answer": "a", "response": "another", "id": 1}
    found = read(row, "dolly", columns=names)
    assert (found.messages, found.unused) == ([USER, ASSISTANT], {"id"})
    swapped = {"instruction": "response", "response": "instruction"}
    row = {"instruction": "a", "response": "q"}
    assert read(row, "dolly", columns=swapped).messages == [USER, ASSISTANT]


def test_content_may_be_parts_of_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    [_, turn] = read(messages(USER, {"role": "assistant", "content": parts})).messages
    assert turn == {"role": "assistant", "content": "ab"}


@pytest.mark.parametrize(
    ("reader", "row"),
    [
        ("prompt_response", {"prompt": [USER], "completion": [ASSISTANT]}),
        ("messages", {"messages": json.dumps([USER, ASSISTANT])}),
        (
            "messages",
            {"messages": [{"speaker": "human", "text": "q"}, {"speaker": "AI", "text": "a"}]},
        ),
    ],
)
def test_conversations_are_read_in_their_forms_in_the_wild(reader, row):
    assert read(row, reader).messages == [USER, ASSISTANT]
