"""A row of preferences becomes a pair whose prompt is one, or is counted with the reason."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import CHAT_TEMPLATES, TOKENIZERS, byte_level, chat_tokenizer

from finetuning.data.cache import prepare
from finetuning.data.collator import Collator
from finetuning.data.example_set import ExampleSet, PairSet
from finetuning.data.examples import IGNORE_INDEX, sequences_of
from finetuning.data.rendering import read_row
from finetuning.data.row import BadRow
from finetuning.data.section import Data, Source
from finetuning.errors import UserError

TOKENIZER = byte_level()
ASKED = {"role": "user", "content": "q"}
TWO = [{"prompt": "q", "chosen": "good", "rejected": "bad"}] * 2


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def said(content, is_trained):
    return turn("assistant", content, is_trained=is_trained)


def read(row, reader="preference", **settings):
    return read_row(row, Source(path="a", reader=reader, **settings))


def data_of(folder: Path, rows, **settings) -> Data:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Data.model_validate(
        {"path": str(file), "reader": "preference", "template": "question_answer"} | settings
    )


ANSWERS = turn("assistant", "good"), turn("assistant", "bad")
HH = "\n\nHuman: q\n\nAssistant: {}"


@pytest.mark.parametrize(
    "reader, row",
    [
        ("preference", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
        ("preference", {"prompt": [ASKED], "chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]}),
        ("preference", {"chosen": [ASKED, ANSWERS[0]], "rejected": [ASKED, ANSWERS[1]]}),
        # ultrafeedback_binarized has the prompt twice.
        (
            "preference",
            {"prompt": "q", "chosen": [ASKED, ANSWERS[0]], "rejected": [ASKED, ANSWERS[1]]},
        ),
        (
            "scored_responses",
            {"prompt": "q", "responses": ["so", "bad", "good"], "scores": [0.5, 0, 2]},
        ),
        ("hh_rlhf", {"chosen": HH.format("good"), "rejected": HH.format("bad ")}),
    ],
)
def test_every_form_of_row_is_the_same_pair(reader, row):
    found = read(row, reader)
    assert found.messages == [ASKED, said("good", True)]
    assert found.rejected == [ASKED, said("bad", True)]
    assert not found.unused


def test_earlier_responses_belong_to_the_prompt_and_are_not_trained():
    history = [turn("system", "s"), ASKED, turn("assistant", "a"), turn("user", "and?")]
    prompt = [*history[:2], said("a", False), history[3]]
    row = {"chosen": [*history, ANSWERS[0]], "rejected": [*history, ANSWERS[1]]}
    assert read(row).messages == [*prompt, said("good", True)]
    row = {"system": "s", "history": [["q", "a"]], "prompt": "and?"}
    found = read(row | {"chosen": "good", "rejected": "bad"})
    assert found.messages == [*prompt, said("good", True)]
    assert found.rejected == [*prompt, said("bad", True)]


@pytest.mark.parametrize(
    "row, reader, problem",
    [
        ({"chosen": "a", "rejected": "b"}, "preference", "column prompt: expected text or turns"),
        ({"prompt": "q", "chosen": "a"}, "preference", "column rejected: expected text"),
        (
            {"chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]},
            "preference",
            "there is no prompt",
        ),
        (
            {"prompt": "q", "chosen": [ANSWERS[0], ASKED], "rejected": "b"},
            "preference",
            "column chosen: ends with user; expected a response",
        ),
        ({"prompt": "q", "responses": ["a"], "scores": [1]}, "scored_responses", "2 or more"),
        ({"prompt": "q", "responses": "ab", "scores": [1]}, "scored_responses", "expected a list"),
        ({"chosen": "Human: q", "rejected": ""}, "hh_rlhf", "column chosen: expected \\\\n\\\\n"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "label": True},
            "preference",
            "column label: it says which responses are good, as KTO wants it, which is not",
        ),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "preference",
            "column label: it says which responses are good, as KTO wants it, which is not",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_refused(row, reader, problem):
    with pytest.raises(BadRow, match=problem):
        read(row, reader)


def test_a_pair_without_use_is_counted_with_its_reason(tmp_path):
    rows = [
        *TWO[:1],
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "good", "rejected": " "},
        {"prompt": "q", "chosen": "good", "rejected": "bad " * 60},  # fits only by half
        {"prompt": "q", "chosen": "x " * 60 + "good", "rejected": "x " * 60 + "bad"},
        {"prompt": "long " * 60, "chosen": "good", "rejected": "bad"},
    ]
    prepared = prepare(data_of(tmp_path, rows, max_length=64), TOKENIZER)
    lost = {"equal_responses": 1, "empty_response": 1, "overflow": 3}
    assert prepared.report["dropped"] == lost
    assert len(prepared.train) == prepared.report["rows"]["kept"] == 1
    assert "row 3: 17 and " in "".join(prepared.report["places"])
    cut = prepare(data_of(tmp_path, rows, max_length=64, overflow="cut"), TOKENIZER).report
    assert cut["dropped"] == {
        "equal_responses": 1,
        "empty_response": 1,
        "no_response": 1,
        "equal_when_cut": 1,
    }
    assert cut["rows"]["kept"] == 2 and cut["cut"] == 1 and cut["end_mark_share"] == 0.5
    with pytest.raises(UserError, match=r"row 3: 17 and .* tokens, data.max_length is 64"):
        prepare(data_of(tmp_path, rows, max_length=64, overflow="error"), TOKENIZER)


def test_the_evaluation_set_counts_pairs_and_copies_are_pairs(tmp_path):
    rows = [{"prompt": f"q{n % 8}", "chosen": "good", "rejected": f"bad {n % 8}"} for n in range(9)]
    data = data_of(tmp_path, rows, eval={"every": 4}, duplicates="drop")
    prepared = prepare(data, TOKENIZER)
    assert prepared.report["dropped"] == {"duplicate": 1}
    assert prepared.eval.rows.tolist() == [0, 4]
    assert prepared.train.rows.tolist() == [1, 2, 3, 5, 6, 7]
    assert prepared.train.chosen.shape == prepared.train.shared.shape == (6,)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["question_answer", "plain_chat", *CHAT_TEMPLATES])
def test_the_prompt_is_one_list_of_ids_and_both_ends_are_trained(tmp_path, kind, template):
    is_chat = template in CHAT_TEMPLATES
    tokenizer = chat_tokenizer(kind, template) if is_chat else TOKENIZERS[kind]()
    rows = [
        {"prompt": "日本の首都は？", "chosen": "東京です。", "rejected": "大阪"},
        {"prompt": "What is 1 + 2?", "chosen": " 3", "rejected": "three\n\n<|im_end|>"},
        {
            "prompt": [ASKED, turn("assistant", "a"), turn("user", "and? ")],
            "chosen": "yes",
            "rejected": "no, I fear",
        },
    ]
    data = data_of(tmp_path, rows, template="chat" if is_chat else template, max_length=256)
    prepared = prepare(data, tokenizer)
    assert len(prepared.train) == 3 and prepared.report["end_mark_share"] == 1.0
    for example in prepared.train:
        both = sequences_of(example)
        begins = [np.flatnonzero(each["labels"] != IGNORE_INDEX)[0] for each in both]
        prompts = [each["input_ids"][:at].tolist() for each, at in zip(both, begins, strict=True)]
        assert prompts[0] == prompts[1] and len(prompts[0]) - 1 == example["shared"] > 0
    longest = max(len(each["input_ids"]) for pair in prepared.train for each in sequences_of(pair))
    assert prepared.report["tokens"]["max"] == prepared.train.longest == longest


def test_a_batch_holds_whole_pairs_in_either_layout(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a b c", "rejected": "a"},
        {"prompt": "long " * 3, "chosen": "a", "rejected": "a b c d e"},
    ]
    prepared = prepare(data_of(tmp_path, rows), TOKENIZER)
    pairs = PairSet(prepared.train)
    pairs.reference = np.arange(8, dtype=np.float32).reshape(2, 4)
    packed, padded = (Collator(layout, 0)([pairs[0], pairs[1]]) for layout in ("packed", "padded"))
    sizes = [
        int((each["labels"] != IGNORE_INDEX).sum())
        for pair in prepared.train
        for each in sequences_of(pair)
    ]
    shared = [min(sizes[:2]), min(sizes[2:])]
    groups = [*[shared[0], sizes[0] - shared[0], shared[0], sizes[1] - shared[0]]]
    groups += [shared[1], sizes[2] - shared[1], shared[1], sizes[3] - shared[1]]
    # The prompt, but for its last token, stands in a packed row once.
    once = [pair["shared"] for pair in prepared.train]
    assert all(once) and packed["shared"] == [0, once[0], 0, once[1]]
    assert packed["input_ids"].numel() == sum(padded["lengths"]) - sum(once)
    assert len(packed["keys"]) == sum(padded["lengths"]) and "keys" not in padded
    for number, length in enumerate(padded["lengths"]):
        before = sum(padded["lengths"][:number])
        seen = packed["input_ids"][0, packed["keys"][before : before + length]]
        assert seen.tolist() == padded["input_ids"][number, :length].tolist()
    for batch in (packed, padded):
        assert batch["counts"].tolist() == groups
        assert batch["reference"].tolist() == pairs.reference.tolist()
        assert len(batch["lengths"]) == 4
    assert packed["targets"].tolist() == padded["targets"].tolist()
    assert padded["input_ids"].shape[0] == 4
    assert padded["input_ids"].numel() <= 2 * prepared.train.widths.max()
    dummy = Collator("packed", 0)([pairs[~0]])
    assert not dummy["counts"].any() and not len(dummy["targets"])


def test_a_pair_has_no_reference_until_it_is_known_and_conversations_have_none(tmp_path):
    prepared = prepare(data_of(tmp_path, TWO), TOKENIZER)
    assert np.isnan(PairSet(prepared.train)[0]["reference"]).all()
    assert "reference" not in ExampleSet(prepared.train)[0]


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"loss_on": "all"}, "loss_on: all does not go with reader: preference"),
        ({"turns": "each"}, "turns: each does not go with reader: preference"),
        (
            {"path": [{"path": "a"}, {"path": "b", "reader": "dolly"}]},
            "reader: preference reads pairs, dolly does not; mix one kind",
        ),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(tmp_path, settings, problem):
    with pytest.raises(ValueError, match=problem):
        data_of(tmp_path, TWO, **settings)
