"""A JSON text that is read value by value says what json.loads says of it as a whole."""

import io
import json
import math
import random
import tracemalloc

import pytest

from finetuning.data import json_text
from finetuning.data.json_text import JsonText

VALUES = [
    *(None, True, False, 0, -1, 2**70, 1.5, -2.5e-7, math.inf, -math.inf),
    *("", "a", "日本語 🙂", '"\\\n\t\u2028\ue000', "\ud800", "a" * 50),
    *([], {}, [[]], [1, [2, {"a": 3}]], {"a": None, "b": {"c": [1.25]}}),
]


@pytest.fixture(params=[1, 2, 3, 7, 2**20])
def chunk(request, monkeypatch):
    monkeypatch.setattr(json_text, "CHUNK", request.param)
    return request.param


def text_of(content: bytes | str) -> JsonText:
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return JsonText(io.BytesIO(content))


def read_whole(content: bytes | str) -> object:
    text = text_of(content)
    kind = text.peek()
    if kind == "[":
        value: object = list(text.elements())
    elif kind == "{":
        value = {key: text.value() for key in text.keys()}  # noqa: SIM118
    else:
        value = text.value()
    text.end()
    return value


def documents():
    draw = random.Random(0)
    for number in range(60):
        values = draw.choices(VALUES, k=draw.randrange(4))
        keys = draw.choices(["a", "b", "ü", ""], k=len(values))
        document = draw.choice([values, dict(zip(keys, values, strict=True)), *values[:1]])
        indent = draw.choice([None, 0, 2])
        text = json.dumps(document, ensure_ascii=number % 2 == 0 or "\\ud800" in repr(document))
        yield (
            draw.choice(["", " \r\n"])
            + (json.dumps(document, indent=indent) if number % 3 == 0 else text)
            + draw.choice(["", "\n\n\t "])
        )


@pytest.mark.usefixtures("chunk")
def test_what_is_read_is_what_json_loads_reads():
    for document in documents():
        found, expected = read_whole(document), json.loads(document)
        assert repr(found) == repr(expected), document
    assert repr(read_whole("[NaN, 12345678901234567890123, 1e400]")) == repr(
        [math.nan, 12345678901234567890123, math.inf]
    )
    assert read_whole('{"a": 1, "a": 2}') == {"a": 2}
    assert read_whole(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    "broken",
    [
        *("[1, 2", "[1 2]", "[1,]", "[,1]", "[1]]", "[1] 2", "[1.]", "[1,\n 2,\n nul]", "["),
        *('{"a": 1', '{"a" 1}', '{"a": }', "{a: 1}", '{"a": 1,}', '{"a": 1} {"b": 2}', "{"),
        *('["a]', '["\\x"]', '["a\nb"]', "[-]", "{1: 2}", "[1, 2,\n\n}", "[--1]", "[1e]"),
    ],
)
def test_what_json_loads_refuses_is_refused_on_the_same_line(broken):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(broken)
    with pytest.raises(json.JSONDecodeError) as found:
        read_whole(broken)
    assert found.value.lineno == expected.value.lineno


def test_bytes_that_are_no_text_are_named_by_their_place_in_the_file(chunk):
    for before in ("[1, ", "[" + "日" * 5):
        for mark in (b"", b"\xef\xbb\xbf"):
            content = mark + before.encode() + b"\xff]"
            with pytest.raises(UnicodeDecodeError) as error:
                read_whole(content)
            assert content[error.value.start] == 0xFF, chunk
    with pytest.raises(UnicodeDecodeError):
        read_whole(b'["\xe6\x97')


def test_a_value_is_dropped_when_the_next_is_asked_for(monkeypatch):
    monkeypatch.setattr(json_text, "CHUNK", 2**12)
    content = ("[" + ", ".join([json.dumps("word " * 100)] * 10_000) + "]").encode()
    text = text_of(content)
    tracemalloc.start()
    count = sum(1 for _ in text.elements())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and peak < len(content) / 50
