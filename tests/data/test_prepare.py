"""Every row is accounted for, the split is always the same, and a cache changes only the time."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TOKENIZERS, byte_level

from finetuning.data.cache import PIPELINE, cache_key, prepare
from finetuning.data.examples import IGNORE_INDEX
from finetuning.data.prepare import training_texts
from finetuning.data.section import Data
from finetuning.data.storage import INDEX, read_prepared, seal
from finetuning.data.templates import TEMPLATES
from finetuning.errors import UserError
from finetuning.model.tokenizer import load_tokenizer
from finetuning.recipe.sections import Model

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id
WORDS = [
    "one",
    "two",
    "three four",
    "five six seven",
    "eight",
    "nine ten",
    "十一",
    "12",
    "",
    "thirteen\nfourteen",
]


def pairs(count, **columns):
    """Rows whose text tells their number and which are of different lengths."""
    return [
        {
            "prompt": f"id{number} {WORDS[number % 10]}",
            "response": WORDS[number % 7] * (1 + number % 3),
            **columns,
        }
        for number in range(count)
    ]


def chat(*turns):
    """A row of `messages` from (role, content) or content alone, user first."""
    roles = ("user", "assistant")
    turns = [
        turn if isinstance(turn, tuple) else (roles[number % 2], turn)
        for number, turn in enumerate(turns)
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def data_of(tmp_path):
    """A data section that reads the rows from a file: data_of(rows, name="rows", **settings)."""

    def data_of(rows, name="rows", **settings):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        reader = "messages" if "messages" in rows[0] else "prompt_response"
        return Data(
            **{"path": str(file), "reader": reader, "template": "question_answer", **settings}
        )

    return data_of


def values(examples):
    arrays = {name: array for name, array in vars(examples).items() if array is not None}
    return {name: array.tolist() for name, array in arrays.items()}


def plain(prepared):
    """All of it as plain values, to compare."""
    held = values(prepared.eval) if prepared.eval else None
    return values(prepared.train), held, prepared.report, prepared.fingerprint


def ids(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def tokens_of(row):
    """(prompt ids, response ids) of a pair, by the tokenizer itself."""
    return ids(f"### Question: {row['prompt']}\n### Answer:"), [*ids(" " + row["response"]), EOS]


# Counting


def test_a_row_becomes_its_prompt_untrained_and_its_response_and_end_mark_trained(data_of):
    rows = pairs(7)
    train = prepare(data_of(rows), TOKENIZER).train
    for row, example in zip(rows, train, strict=True):
        prompt, response = tokens_of(row)
        assert example["input_ids"].tolist() == prompt + response
        assert example["labels"].tolist() == [IGNORE_INDEX] * len(prompt) + response


def test_every_row_is_kept_or_dropped_for_a_reason(data_of):
    rows = [
        {**chat("a", "b"), "lang": "en"},
        {**chat("a", "b"), "lang": "ja"},
        {**chat("a", ("assistant", 5)), "lang": "en"},
        {**chat("a", "b" * 200), "lang": "en"},
        {**chat("a"), "lang": "en"},
        {**chat("c", "d", "e", "f"), "lang": "en"},
        {**chat("a", ("robot", "b")), "lang": "en"},
        {**chat("g", "h"), "lang": "en"},
        {"messages": [], "lang": "en"},
        {**chat("i", "j"), "lang": "en"},
        {**chat("k", "l")},
    ]
    data = data_of(
        rows, where={"lang": "en"}, invalid_rows="drop", max_length=100, eval={"every": 2}
    )
    prepared = prepare(data, TOKENIZER)
    report = prepared.report
    assert report["rows"] == {"loaded": 11, "where": 9, "kept": 4, "train": 2, "eval": 2}
    assert report["dropped"] == {"invalid": 3, "overflow": 1, "no_response": 1}
    assert report["rows"]["where"] == report["rows"]["kept"] + sum(report["dropped"].values())
    assert prepared.eval.rows.tolist() == [0, 7]
    assert prepared.train.rows.tolist() == [5, 9]

    places = [
        re.fullmatch(r"(\w+): /.*/rows\.jsonl: row (\d+)(.*)", place).groups()
        for place in report["places"]
    ]
    assert [(reason, int(row)) for reason, row, _ in places] == [
        ("invalid", 2),
        ("invalid", 6),
        ("invalid", 8),
        ("overflow", 3),
        ("no_response", 4),
    ]
    assert places[0][2] == ": column messages, turn 1: expected text, found int 5"


def test_tokens_are_counted_over_the_kept_rows(data_of):
    rows = [*pairs(20), {"prompt": "a", "response": "b" * 500}]
    report = prepare(data_of(rows, eval={"every": 3}, max_length=200), TOKENIZER).report
    prompts, responses = zip(*map(tokens_of, rows[:20]), strict=True)
    assert report["tokens"] == {
        "prompt": sum(map(len, prompts)),
        "response": sum(map(len, responses)),
        "total": sum(map(len, prompts + responses)),
        "max": max(
            len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)
        ),
    }
    assert report["end_mark_share"] == 1.0
    assert report["cut"] == 0


def test_only_the_first_places_of_a_reason_are_told_but_all_are_counted(data_of):
    rows = [{"prompt": number, "response": "a"} for number in range(9)] + pairs(2)
    report = prepare(data_of(rows, invalid_rows="drop"), TOKENIZER).report
    assert report["dropped"] == {"invalid": 9}
    assert len(report["places"]) == 5


def test_an_invalid_row_ends_the_run_unless_the_recipe_says_drop(data_of):
    with pytest.raises(
        UserError, match=r"rows\.jsonl: row 2: column prompt: .* \(data\.invalid_rows: drop"
    ):
        prepare(data_of([*pairs(2), {"prompt": None, "response": "a"}]), TOKENIZER)


def test_where_compares_values_and_not_their_text(data_of):
    rows = [{"prompt": "a", "response": "b", "n": n} for n in (1, "1", None, [1], 1)]
    prepared = prepare(data_of(rows, where={"n": 1}), TOKENIZER)
    assert prepared.train.rows.tolist() == [0, 4]
    assert prepare(data_of(rows, where={"n": [1]}), TOKENIZER).train.rows.tolist() == [3]
    assert prepare(data_of(rows, where={"n": None}), TOKENIZER).train.rows.tolist() == [2]


def test_several_columns_of_where_must_all_match(data_of):
    rows = [{"prompt": "a", "response": "b", "n": n % 2, "m": n % 3} for n in range(6)]
    assert prepare(data_of(rows, where={"n": 1, "m": 2}), TOKENIZER).train.rows.tolist() == [5]


# Overflow

TALK = chat(
    "first question", "first answer", "second", "the second answer is longer", "third", "ok"
)


def test_a_row_of_exactly_max_length_stays_and_one_token_more_is_too_long(data_of):
    (row,) = pairs(1)
    length = sum(map(len, tokens_of(row)))
    for overflow in ("drop", "cut", "error"):
        report = prepare(data_of([row], max_length=length, overflow=overflow), TOKENIZER).report
        assert (report["rows"]["train"], report["cut"]) == (1, 0)
    with pytest.raises(UserError, match=f"row 0: {length} tokens, data.max_length is {length - 1}"):
        prepare(data_of([row], max_length=length - 1, overflow="error"), TOKENIZER)
    with pytest.raises(UserError, match='"overflow": 1'):
        prepare(data_of([row], max_length=length - 1), TOKENIZER)
    cut = prepare(data_of([row], max_length=length - 1, overflow="cut"), TOKENIZER)
    assert cut.report["cut"] == 1
    assert cut.report["end_mark_share"] == 0.0
    assert EOS not in cut.train.input_ids


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_a_cut_row_is_the_beginning_of_the_whole_row(data_of, loss_on):
    (whole,) = prepare(data_of([TALK], loss_on=loss_on), TOKENIZER).train
    for limit in range(2, len(whole["input_ids"])):
        data = data_of([TALK], loss_on=loss_on, overflow="cut", max_length=limit)
        if (whole["labels"][:limit] == IGNORE_INDEX).all():
            with pytest.raises(UserError, match='"no_response": 1'):
                prepare(data, TOKENIZER)
            continue
        prepared = prepare(data, TOKENIZER)
        (cut,) = prepared.train
        assert np.array_equal(cut["input_ids"], whole["input_ids"][:limit])
        assert np.array_equal(cut["labels"], whole["labels"][:limit])
        assert prepared.report["cut"] == 1


def test_the_end_mark_of_a_cut_row_counts_where_its_last_trained_response_is_whole(data_of):
    (whole,) = prepare(data_of([TALK]), TOKENIZER).train
    trained = np.flatnonzero(whole["labels"] != IGNORE_INDEX)
    shares = []
    for limit in range(trained[0] + 1, len(whole["labels"])):
        shares.append(
            prepare(data_of([TALK], overflow="cut", max_length=limit), TOKENIZER).report[
                "end_mark_share"
            ]
        )
        last = trained[trained < limit][-1]
        assert shares[-1] == float(whole["labels"][last] == EOS), limit
    assert set(shares) == {0.0, 1.0}


def test_the_share_of_end_marks_is_of_the_kept_rows(data_of):
    rows = [
        chat("a", "b"),
        chat("a", "b" * 90),
        chat("a" * 90, "b"),
        chat("c", "d"),
        chat("e", "f" * 90),
    ]
    report = prepare(data_of(rows, overflow="cut", max_length=40), TOKENIZER).report
    assert report["dropped"] == {"no_response": 1}
    assert report["cut"] == 2
    assert report["end_mark_share"] == 0.5


def test_loss_on_all_trains_every_token_but_the_first(data_of):
    rows = pairs(5)
    response, everything = (
        prepare(data_of(rows, loss_on=name), TOKENIZER) for name in ("response", "all")
    )
    assert values(everything.train)["input_ids"] == values(response.train)["input_ids"]
    for example in everything.train:
        assert example["labels"].tolist() == [IGNORE_INDEX, *example["input_ids"].tolist()[1:]]
    assert everything.report["tokens"]["prompt"] == 5
    assert everything.report["tokens"]["response"] == len(everything.train.input_ids) - 5


# Holding out


@pytest.mark.parametrize("every", [2, 3, 7])
def test_every_nth_of_the_kept_rows_is_held_out_beginning_with_the_first(data_of, every):
    rows = pairs(25)
    for number in (0, 4, 5, 11):
        rows[number]["response"] = "too long " * 60
    prepared = prepare(data_of(rows, eval={"every": every}, max_length=100), TOKENIZER)
    kept = [number for number in range(25) if number not in (0, 4, 5, 11)]
    assert prepared.eval.rows.tolist() == kept[::every]
    assert prepared.train.rows.tolist() == [row for row in kept if row not in kept[::every]]


def test_a_drawn_share_is_the_same_every_time_and_another_with_another_seed(data_of):
    drawn = {}
    rows = [
        {**row, "response": f"{number} {row['response']}"} for number, row in enumerate(pairs(40))
    ]
    for seed in (None, 0, 1, 2):
        prepared = prepare(data_of(rows, eval={"fraction": 0.25, "seed": seed}), TOKENIZER)
        held, train = prepared.eval.rows.tolist(), prepared.train.rows.tolist()
        assert len(held) == 10
        assert sorted(held + train) == list(range(40))
        assert (held, train) == (sorted(held), sorted(train))
        drawn[seed] = held
    assert drawn[None] == drawn[0]
    assert len({tuple(held) for held in drawn.values()}) == 3
    assert plain(prepare(data_of(rows, eval={"fraction": 0.25, "seed": 2}), TOKENIZER)) == plain(
        prepared
    )


def test_a_drawn_share_is_the_one_it_has_always_been(data_of):
    """Of numpy's PCG64: another draw would be another data split for everyone who trains again."""
    assert prepare(data_of(pairs(20), eval={"fraction": 0.2}), TOKENIZER).eval.rows.tolist() == [
        2,
        4,
        6,
        19,
    ]


def test_a_small_share_holds_out_one_row_at_least(data_of):
    assert len(prepare(data_of(pairs(5), eval={"fraction": 0.01}), TOKENIZER).eval) == 1


def test_a_named_split_is_held_out_whole_and_filtered_like_the_rest(tmp_path):
    for name, count in (("train", 6), ("test", 4)):
        rows = [{**row, "n": number % 2} for number, row in enumerate(pairs(count))]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(
        path=str(tmp_path),
        reader="prompt_response",
        template="question_answer",
        eval={"split": "test"},
        where={"n": 1},
    )
    prepared = prepare(data, TOKENIZER)
    assert prepared.train.rows.tolist() == [1, 3, 5]
    assert prepared.eval.rows.tolist() == [7, 9]  # numbered on: the split's rows 1 and 3
    assert prepared.report["rows"] == {"loaded": 10, "where": 5, "kept": 5, "train": 3, "eval": 2}


def test_without_eval_nothing_is_held_out(data_of):
    prepared = prepare(data_of(pairs(5)), TOKENIZER)
    assert prepared.eval is None
    assert prepared.report["rows"]["eval"] == 0
    assert prepared.train.rows.tolist() == [0, 1, 2, 3, 4]


# Mixing


@pytest.fixture
def mixed(data_of):
    """Three sources of forty rows, used half, twice and one and a half times.

    Every fifth row is held out.
    """
    weights = {"half": 0.5, "twice": 2.0, "more": 1.5}
    paths = [
        {"path": data_of(pairs(40), name).path, "weight": weight}
        for name, weight in weights.items()
    ]
    return Data(path=paths, reader="prompt_response", template="question_answer", eval={"every": 5})


def test_weights_repeat_training_rows_and_never_those_held_out(mixed):
    prepared = prepare(mixed, TOKENIZER)
    held = prepared.eval.rows.tolist()
    assert held == list(range(0, 120, 5))
    copies = Counter(prepared.train.rows.tolist())
    assert not set(copies) & set(held)
    half, twice, more = (
        [copies[row] for row in range(start, start + 40) if row not in held]
        for start in (0, 40, 80)
    )
    assert set(half) == {0, 1} and 8 <= sum(half) <= 24
    assert set(twice) == {2}
    assert set(more) == {1, 2} and 40 <= sum(more) <= 56
    assert prepared.report["rows"]["train"] == sum(half) + sum(twice) + sum(more)


def test_mixing_is_the_same_every_time(mixed):
    assert plain(prepare(mixed, TOKENIZER)) == plain(prepare(mixed, TOKENIZER))


def test_sources_of_different_formats_are_read_each_by_its_own_reader(data_of):
    talk = data_of([{**TALK, "lang": "en"}], "talk").path
    alpaca = data_of(
        [{"instruction": "id1", "input": "x", "output": "y"}], "alpaca", reader="alpaca"
    ).path
    data = Data(
        path=[{"path": talk, "reader": "messages", "where": {"lang": "en"}}, {"path": alpaca}],
        reader="alpaca",
        template="question_answer",
    )
    talk, alpaca = prepare(data, TOKENIZER).train
    assert EOS in talk["input_ids"]
    assert (
        TOKENIZER.decode(alpaca["input_ids"])
        == "### Question: id1\n### Context: x\n### Answer: y<|endoftext|>"
    )


def test_the_row_number_of_an_example_is_that_of_the_row_as_loaded(data_of):
    first, second = (
        [{**row, "n": number % 4} for number, row in enumerate(pairs(30))] for _ in range(2)
    )
    for number, row in enumerate([*first, *second]):
        row["prompt"] = f"id{number} {'x' * (90 if number % 7 == 3 else 1)}"
        row["response"] = None if number % 11 == 5 else "yes"
    paths = [
        {"path": data_of(first, "first").path},
        {"path": data_of(second, "second").path, "where": {"n": 1}},
    ]
    settings = {
        "reader": "prompt_response",
        "template": "question_answer",
        "invalid_rows": "drop",
        "max_length": 60,
    }
    prepared = prepare(Data(path=paths, eval={"every": 4}, **settings), TOKENIZER)
    assert prepared.report["dropped"].keys() == {"overflow", "invalid"}
    for examples in (prepared.train, prepared.eval):
        assert len(examples) > 5
        for row, example in zip(examples.rows.tolist(), examples, strict=True):
            assert TOKENIZER.decode(example["input_ids"]).startswith(f"### Question: id{row} ")


def test_texts_to_train_a_tokenizer_on_leave_a_held_out_split_alone(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "secret", "response": "secret"}\n')
    settings = {
        "reader": "prompt_response",
        "template": "question_answer",
        "eval": {"split": "test"},
    }
    texts = list(training_texts(Data(path=str(tmp_path), **settings)))
    assert "".join(texts) == "### Question: a\n### Answer: b"


def test_texts_to_train_a_tokenizer_on_are_those_of_rows_held_out_by_number_too(data_of):
    texts = "".join(training_texts(data_of(pairs(9), eval={"every": 3})))
    assert all(f"id{number} " in texts for number in range(9))


@pytest.fixture
def without_system(data_of, monkeypatch):
    """Two rows, one of them with a system turn, for which the template has no place."""
    monkeypatch.setitem(TEMPLATES, "plain_chat", replace(TEMPLATES["plain_chat"], system=None))
    rows = [chat("Hi", "Hello!"), chat(("system", "Be kind."), ("user", "a"), ("assistant", "b"))]
    return data_of(rows, template="plain_chat")


def test_texts_to_train_a_tokenizer_on_are_without_rows_that_are_dropped(without_system):
    texts = training_texts(without_system.model_copy(update={"invalid_rows": "drop"}))
    assert "".join(texts) == "User: Hi\nAssistant: Hello!"


def test_a_row_that_does_not_fit_the_template_is_an_error_when_a_tokenizer_is_trained_too(
    without_system,
):
    with pytest.raises(
        UserError,
        match=r"rows\.jsonl: row 1: turn 0: the template has no place for the role system",
    ):
        load_tokenizer(
            Model(from_scratch={"vocab_size": 300, "config": {}}), training_texts(without_system)
        )


# The cache


@pytest.fixture
def data(data_of):
    rows = [*pairs(8), {"prompt": 5, "response": "a"}, {"prompt": "a", "response": "長い" * 90}]
    return data_of(rows, invalid_rows="drop", eval={"every": 3}, max_length=100)


def cached(folder):
    (sealed,) = folder.glob(f"*/{INDEX}")
    return sealed.parent


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "settings", [{}, {"eval": None}, {"overflow": "cut", "loss_on": "all", "newline": "<NL>"}]
)
def test_with_and_without_a_cache_all_is_the_same(data, tmp_path, kind, settings):
    data, tokenizer = data.model_copy(update=settings), TOKENIZERS[kind]()
    without = prepare(data, tokenizer)
    first = prepare(data, tokenizer, tmp_path / "cache")
    second = prepare(data, tokenizer, tmp_path / "cache")
    assert plain(without) == plain(first) == plain(second)
    for one, other in ((without.train, second.train), (without.eval, second.eval)):
        types = [
            {name: array.dtype for name, array in vars(part).items() if array is not None}
            if part
            else None
            for part in (one, other)
        ]
        assert types[0] == types[1]


def test_the_second_call_is_answered_from_the_file(data, tmp_path):
    first = prepare(data, TOKENIZER, tmp_path / "cache")
    written = cached(tmp_path / "cache")
    assert written.name == cache_key(data, TOKENIZER)
    (written / INDEX).unlink()
    seal(written, {"written by": "this test"}, first.fingerprint)
    assert prepare(data, TOKENIZER, tmp_path / "cache").report == {"written by": "this test"}


def damaged(content):
    """The content with a byte more, bytes less, or any byte changed."""
    for length in (0, 1, 31, 64, 100, len(content) // 2, len(content) - 1):
        yield content[:length]
    for place in [
        *range(0, len(content), 97),
        *range(max(0, len(content) - 900), len(content), 11),
    ]:
        yield content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
    yield content + b"more"


def test_prepared_rows_that_are_damaged_are_made_again(data, tmp_path):
    right = plain(prepare(data, TOKENIZER, tmp_path / "cache"))
    folder = cached(tmp_path / "cache")
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for wrong in damaged(content):
            file.write_bytes(wrong)
            assert read_prepared(folder) is None, file.name
        file.unlink()
        assert read_prepared(folder) is None, file.name
        assert plain(prepare(data, TOKENIZER, tmp_path / "cache")) == right
        assert file.read_bytes() == content
    assert not list(folder.parent.glob("*.tmp"))


def test_an_edited_data_file_is_read_anew(data, tmp_path):
    first = prepare(data, TOKENIZER, tmp_path / "cache")
    file = Path(data.path)
    file.write_text(file.read_text(encoding="utf-8").replace("id4", "id44"), encoding="utf-8")
    second = prepare(data, TOKENIZER, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    assert "id44" in TOKENIZER.decode(second.train.input_ids)


# Another value of every setting of the data section that changes the examples.
OTHER = {
    "path": "other",
    "split": "test",
    "reader": "dolly",
    "sessions": 2,
    "where": {"a": 1},
    "weight": 2.0,
    "invalid_rows": "drop",
    "template": "plain_chat",
    "newline": "<NL>",
    "max_length": 64,
    "overflow": "cut",
    "loss_on": "all",
    "turns": "each",
    "chat_template": "qwen3_training",
    "chat_template_kwargs": {"enable_thinking": False},
    "columns": {"answer": "said"},
    "duplicates": "drop",
    "eval": {"every": 5},
}
HUB_ONLY = {"config", "revision"}  # a local source has none, and datasets' own fingerprint has them
NO_MATTER = {"layout": "padded", "order": "sequential", "batch_tokens": 1000, "num_proc": 3}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with data in `here` and the same data in `other`."""
    monkeypatch.chdir(tmp_path)
    for name in ("here", "other"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(
                '{"Session-1": {"scene": "a", "dialogue": ["Ron: b"]}}'
            )
    return {"path": "here", "reader": "harry_potter", "sessions": 1, "template": "question_answer"}


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_is_another_cache_file(folder, name):
    if name.startswith("chat_template"):
        folder = {**folder, "template": "chat"}
    other = {**folder, name: OTHER[name], **({"sessions": None} if name == "reader" else {})}
    assert cache_key(Data(**other), TOKENIZER) != cache_key(Data(**folder), TOKENIZER)


@pytest.mark.parametrize("name", NO_MATTER)
def test_how_examples_are_laid_out_is_the_same_cache_file(folder, name):
    other = {**folder, name: NO_MATTER[name]}
    assert cache_key(Data(**other), TOKENIZER) == cache_key(Data(**folder), TOKENIZER)


def test_every_setting_is_known_to_matter_to_the_cache_or_not():
    assert {*OTHER, *NO_MATTER, *HUB_ONLY} == set(Data.model_fields)


def test_another_tokenizer_is_another_cache_file(data):
    more, marked = byte_level(), byte_level()
    more.add_tokens(["<NL>"])
    marked.eos_token = "<|im_end|>"
    keys = [cache_key(data, tokenizer) for tokenizer in (TOKENIZER, more, marked)]
    assert len(set(keys)) == 3
    assert cache_key(data, byte_level()) == keys[0]


def test_every_module_that_examples_depend_on_is_part_of_the_cache_key():
    named = {path.stem for path in PIPELINE}
    assert {"sources", "readers", "harry_potter", "chat_template", "tokenization"} <= named
    for path in PIPELINE:
        imported = re.findall(r"^from finetuning\.data\.(\w+) import", path.read_text(), re.M)
        assert set(imported) <= named, path.name


def test_an_edited_held_out_split_is_another_cache_file(folder):
    settings = {**folder, "eval": {"split": "test"}}
    first = cache_key(Data(**settings), TOKENIZER)
    Path("here/test.json").write_text("{}")
    assert cache_key(Data(**settings), TOKENIZER) != first


def test_a_cache_that_cannot_be_written_costs_time_and_no_more(data, tmp_path):
    (tmp_path / "file").write_text("")
    assert plain(prepare(data, TOKENIZER, tmp_path / "file" / "cache")) == plain(
        prepare(data, TOKENIZER)
    )


PROCESS = """
import json, sys, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from finetuning.data.cache import prepare
from finetuning.data.section import Data
from finetuning.data.storage import INDEX, read_prepared, seal

folder = Path(sys.argv[1])
data = Data(**json.loads((folder / "data.json").read_text()))
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
(folder / f"ready.{sys.argv[2]}").touch()
while len(list(folder.glob("ready.*"))) < 2:
    time.sleep(0.001)
prepared = prepare(data, tokenizer, folder / "cache")
file = next((folder / "cache").glob("*/prepared.json"))
parts = [
    {name: array.tolist() for name, array in vars(part).items() if array is not None}
    for part in (prepared.train, prepared.eval)
]
written = [file.stat().st_ino, file.stat().st_mtime_ns]
print(json.dumps([parts, prepared.report, prepared.fingerprint, *written]))
"""


def test_two_processes_at_once_share_the_work_of_one(data_of, tmp_path):
    data = data_of(pairs(300), eval={"every": 5})
    (tmp_path / "data.json").write_text(data.model_dump_json())
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    commands = [[sys.executable, "-c", PROCESS, tmp_path, name] for name in ("a", "b")]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    first, second = map(json.loads, outputs)
    assert first == second  # the file's inode and time too: it was written once
    train, held, report, fingerprint = plain(prepare(data, TOKENIZER))
    assert first[:3] == [[train, held], report, fingerprint]
    assert [file.suffix for file in sorted((tmp_path / "cache").iterdir())] == ["", ".lock"]


# The fingerprint


def test_the_fingerprint_is_of_the_examples_and_not_of_where_they_come_from(data_of):
    first = prepare(data_of(pairs(9), eval={"every": 3}), TOKENIZER).fingerprint
    assert (
        prepare(
            data_of(pairs(9), "copy", eval={"every": 3}, layout="padded"), TOKENIZER
        ).fingerprint
        == first
    )
    assert (
        prepare(data_of(pairs(9), eval={"every": 3}, max_length=500), TOKENIZER).fingerprint
        == first
    )


def test_the_fingerprint_changes_with_any_token_label_or_share(data_of):
    edited = pairs(9)
    edited[4]["response"] += "."
    variants = [
        (pairs(9), {}),
        (edited, {}),
        (pairs(10), {}),
        (pairs(9), {"loss_on": "all"}),
        (pairs(9), {"eval": {"every": 4}}),
        (pairs(9), {"eval": None}),
        (pairs(9), {"template": "plain_chat"}),
        (pairs(9), {"weight": 2.0}),
    ]
    prints = {
        prepare(data_of(rows, **{"eval": {"every": 3}, **settings}), TOKENIZER).fingerprint
        for rows, settings in variants
    }
    assert len(prints) == len(variants)
