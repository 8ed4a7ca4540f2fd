"""Rows that say the same fall on one side of the evaluation split, and copies can be left out."""

import json

import numpy as np
import pytest
from conftest import ROOT
from tiny import byte_level

from finetuning.data.cache import prepare
from finetuning.data.groups import first_of_group, prompt_key, response_key, text_key
from finetuning.data.row import message
from finetuning.data.section import Data, Eval
from finetuning.errors import UserError
from finetuning.recipe.recipe import load_recipe

TOKENIZER = byte_level()
LONG = "A long answer that nobody writes twice by chance"


def pair(prompt, response, **columns):
    return {"prompt": prompt, "response": response, **columns}


@pytest.fixture
def prepared_of(tmp_path):
    def prepared_of(rows, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reader = "messages" if "messages" in rows[0] else "prompt_response"
        settings = {"path": str(file), "reader": reader, "template": "question_answer", **settings}
        return prepare(Data(**settings), TOKENIZER)

    return prepared_of


def sides(prepared):
    return prepared.eval.rows.tolist(), prepared.train.rows.tolist()


def test_a_group_goes_where_its_first_row_is_drawn_to(prepared_of):
    rows = [pair(f"question {number}", f"answer {number}") for number in range(8)]
    rows[5]["prompt"] = " Question\n0"  # of row 0, which is held out
    rows[6]["prompt"] = "question 1"  # is drawn, but row 1 is not
    held, train = sides(prepared_of(rows, eval={"every": 3}))
    assert (held, train) == ([0, 3, 5], [1, 2, 4, 6, 7])


def test_a_long_answer_joins_two_questions_and_a_short_one_does_not(prepared_of):
    rows = [pair(f"question {number}", "Yes") for number in range(6)]
    rows[0]["response"], rows[4]["response"] = LONG, LONG.upper()
    assert sides(prepared_of(rows, eval={"every": 6})) == (
        [0, 4],
        [1, 2, 3, 5],
    )


def test_groups_that_share_a_row_are_one_group(prepared_of):
    rows = [
        pair("a", LONG),
        pair("b", "1"),
        pair("c", LONG),
        pair("c", LONG + "!"),
        pair("d", LONG + "!"),
    ]
    assert sides(prepared_of(rows, eval={"every": 5})) == (
        [0, 2, 3, 4],
        [1],
    )


def test_rows_of_one_value_of_a_column_stay_together(prepared_of):
    rows = [pair("the same", LONG, book=number // 3) for number in range(9)]
    rows[8]["book"] = None  # of no group
    held, train = sides(prepared_of(rows, eval={"every": 6, "group_by": "book"}))
    assert (held, train) == ([0, 1, 2, 6, 7], [3, 4, 5, 8])
    held, train = sides(prepared_of(rows, eval={"fraction": 0.1, "group_by": "book"}))
    assert {row // 3 for row in held}.isdisjoint({row // 3 for row in train} - {8 // 3})


def test_a_column_that_no_row_has_groups_nothing_and_is_refused(prepared_of):
    with pytest.raises(UserError, match=r"data\.eval\.group_by: no row has a column boook"):
        prepared_of([pair("a", "b", book=1)] * 3, eval={"every": 2, "group_by": "boook"})


def test_a_system_message_is_no_prompt_and_later_turns_are_none():
    talk = [
        message("system", "Be kind."),
        message("user", "Hi"),
        message("assistant", "Hello"),
        message("user", "Bye"),
        message("assistant", LONG),
    ]
    assert prompt_key(talk) == text_key("hi") == prompt_key(talk[1:3])
    assert response_key(talk) == text_key("Hello", LONG)
    assert response_key(talk[:3]) == 0
    assert prompt_key([message("assistant", LONG)]) == 0


def test_rows_without_a_key_are_alone():
    keys = np.array([0, 0, 7, 0, 7], np.uint64)
    assert first_of_group([keys]).tolist() == [0, 1, 2, 3, 2]
    assert first_of_group([keys[:0]]).tolist() == []


def test_copies_are_counted_and_left_out_where_the_recipe_says_so(prepared_of):
    rows = [pair("a", "b"), pair("c", "d"), pair("a", "b"), pair("A", "b"), pair("c", "d")]
    kept = prepared_of(rows).report
    assert (kept["rows"]["kept"], kept["duplicates"], kept["dropped"]) == (5, 2, {})
    dropped = prepared_of(rows, duplicates="drop")
    assert dropped.train.rows.tolist() == [0, 1, 3]
    assert dropped.report["rows"]["kept"] == 3
    assert dropped.report["dropped"] == {"duplicate": 2}
    assert dropped.report["places"] == [
        "duplicate: row 2 of all is row 0 once more",
        "duplicate: row 4 of all is row 1 once more",
    ]
    assert dropped.report["tokens"]["total"] == len(dropped.train.input_ids)


def test_many_copies_are_all_counted(prepared_of):
    report = prepared_of([pair("a", "b")] * 20, duplicates="drop").report
    assert report["dropped"] == {"duplicate": 19}
    assert len(report["places"]) == 5


def test_what_a_named_split_has_in_common_with_training_is_counted(tmp_path):
    train = [pair("a", "b"), pair("c", LONG)]
    for name, rows in (
        ("train", train),
        ("test", [pair("A", "x"), pair("y", LONG), pair("z", "b")]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path), "reader": "prompt_response", "template": "question_answer"}
    report = prepare(Data(**data, eval={"split": "test"}), TOKENIZER).report
    assert report["leaked"] == 2
    assert report["rows"]["eval"] == 3


def test_nothing_that_is_drawn_stands_on_both_sides(prepared_of):
    random = np.random.default_rng(0)
    rows = [
        pair(f"question {random.integers(400)}", f"{LONG} {random.integers(400)}")
        for _ in range(100)
    ]
    alone = prepared_of(rows, eval={"fraction": 0.2, "group_by": None})
    assert len(alone.eval) == 20 and alone.report["leaked"] > 0
    prepared = prepared_of(rows, eval={"fraction": 0.2})
    held, train = sides(prepared)
    for name in ("prompt", "response"):
        assert {rows[n][name] for n in held}.isdisjoint({rows[n][name] for n in train})
    assert prepared.report["leaked"] == 0


def test_rows_that_are_all_one_group_leave_nothing_to_train_on(prepared_of):
    rows = [pair("the same", LONG)] * 3
    with pytest.raises(UserError, match=r"to train on: .*; data\.eval\.group_by: null draws each"):
        prepared_of(rows, eval={"every": 2})
    assert sides(prepared_of(rows, eval={"every": 2, "group_by": None})) == ([0, 2], [1])


@pytest.mark.parametrize(
    ("said", "group_by"),
    [
        ({"every": 5}, "same_text"),
        ({"fraction": 0.1, "seed": 3}, "same_text"),
        ({"every": 5, "group_by": None}, None),
        ({"split": "test"}, None),
        # As recipe.yaml of a run folder says it, of a version that knew no groups, and of later.
        ({"every": 5, "fraction": None, "seed": None, "split": None}, None),
        ({"every": 5, "fraction": None, "seed": None, "split": None, "group_by": "book"}, "book"),
    ],
)
def test_what_is_drawn_is_drawn_by_group_unless_a_recipe_or_an_older_run_says_otherwise(
    said, group_by
):
    assert Eval.model_validate(said).group_by == group_by
    assert Eval.model_validate(Eval.model_validate(said).model_dump()).group_by == group_by


def test_every_recipe_that_draws_its_evaluation_set_keeps_the_same_text_on_one_side():
    drawn = {
        file.name: recipe.data.eval.group_by
        for file in ROOT.glob("recipes/*.yaml")
        if (recipe := load_recipe(file)).data.eval and recipe.data.eval.split is None
    }
    alone = {name for name, group_by in drawn.items() if group_by != "same_text"}
    assert len(drawn) > 3 and {name.partition("_bloomz")[0] for name in alone} == {"harry_potter"}
