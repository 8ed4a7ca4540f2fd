"""From a row to its examples, and what the report says of keys, turns and empty responses."""

import json

import pytest
from pydantic import ValidationError
from tiny import byte_level, chat_tokenizer

from finetuning.data.cache import prepare
from finetuning.data.examples import IGNORE_INDEX
from finetuning.data.section import Data


def prepared(folder, rows, tokenizer=None, **settings):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Data(path=str(folder / "rows.jsonl"), num_proc=1, **settings)
    return prepare(data, tokenizer or byte_level())


def talk(*contents, **keys):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": turns, **keys}


def trained(example, tokenizer):
    return tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX])


CHAT = {"reader": "messages", "template": "chat"}


def test_the_report_names_unused_columns_and_counts_empty_responses(tmp_path):
    rows = [talk("q", "a", id=1, source="x", **{"": 0}), talk("q", " "), talk("q", "", weight=1)]
    report = prepared(tmp_path, rows, reader="messages", template="plain_chat").report
    assert report["unused"] == ["(no name)", "id", "source"]
    assert report["empty"] == 2
    assert report["conversations"] == 0


def test_a_conversation_whose_history_is_rewritten_is_counted_as_its_examples(tmp_path):
    tokenizer = chat_tokenizer("byte_level", "thinking")
    rows = [talk("q1", "a1", "q2", "a2"), talk("q3", "a3")]
    made = prepared(tmp_path, rows, tokenizer, **CHAT)
    assert (made.report["conversations"], made.report["examples"]) == (2, 3)
    assert [trained(example, tokenizer) for example in made.train] == [
        f"<think>\n\n</think>\n\na{n}<|im_end|>" for n in (1, 2, 3)
    ]
    assert made.train.rows.tolist() == [0, 0, 1]
    last = prepared(tmp_path, rows, tokenizer, **CHAT, loss_on="last_response")
    assert last.report["conversations"] == 0
    assert [trained(example, tokenizer)[-12:] for example in last.train] == [
        "a2<|im_end|>",
        "a3<|im_end|>",
    ]


def test_a_row_without_a_trained_response_is_dropped_and_counted(tmp_path):
    rows = [talk("q", "a"), talk("q", "a", train=False)]
    made = prepared(tmp_path, rows, reader="messages", template="plain_chat")
    assert made.report["dropped"] == {"no_response": 1}
    assert made.train.rows.tolist() == [0]


def test_text_alone_is_trained_whole_but_its_first_token(tmp_path):
    tokenizer = byte_level()
    made = prepared(tmp_path, [{"text": "Once upon a time"}], reader="text", template="text")
    [example] = made.train
    assert tokenizer.decode(example["input_ids"]) == "Once upon a time<|endoftext|>"
    assert example["labels"].tolist() == [IGNORE_INDEX, *example["input_ids"][1:].tolist()]


def test_text_goes_with_its_own_template():
    with pytest.raises(ValidationError, match="reader: text goes with template: text"):
        Data(path="a", reader="text", template="plain_chat")
