"""Asking turns: the same answers however they are shared out, stopped and started again."""

import dataclasses
import itertools
import json

import pytest
import tiny

from finetuning.data.chosen_template import load_template
from finetuning.data.row import message
from finetuning.data.section import Data
from finetuning.evaluation.asking import Share, ask
from finetuning.evaluation.turns import Turn, draw, turns_of
from finetuning.inference import generation
from finetuning.inference.generation import Asker
from finetuning.recipe.sections import Generation

TURNS = [
    Turn(number, 1, [message("user", "What is it? " * (1 + number * 7 % 5))], "It.")
    for number in range(37)
]


@pytest.fixture(scope="module")
def asker():
    tokenizer = tiny.byte_level()
    data = Data(path="rows.jsonl", reader="prompt_response", template="question_answer")
    settings = Generation(do_sample=True, temperature=2.0, max_new_tokens=5)
    template = load_template(data, tokenizer)
    return Asker(tiny.model_of("gpt2", len(tokenizer)), tokenizer, template, settings)


class OneOf(Share):
    """One of several processes that does not hear of the others' answers."""

    def together(self, answers):
        return answers

    def of_first(self, value):
        return value


def test_two_processes_give_the_answers_of_one(asker):
    alone = ask(asker, TURNS)
    parts = [ask(asker, TURNS, OneOf(number, 2)) for number in range(2)]
    assert all(parts) and not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == alone
    assert alone.keys() == {turn.key for turn in TURNS}
    assert len({answer.text for answer in alone.values()}) > len(TURNS) / 2  # they are sampled


def test_every_process_answers_all_where_the_model_is_sharded(asker):
    assert ask(asker, TURNS, OneOf(1, 2, is_sharded=True)) == ask(asker, TURNS)


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_was_answered_before_a_kill_is_not_asked_again(asker, rounds):
    kept = []

    def killed(found):
        kept.append(found)
        if len(kept) == rounds:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(asker, TURNS, keep=killed)
    known = {key: answer for found in kept for key, answer in found.items()}
    later = []
    assert ask(asker, TURNS, known=known, keep=later.append) == ask(asker, TURNS)
    assert not set(itertools.chain(*later)) & known.keys()


def test_no_further_question_is_asked_when_time_is_out(asker):
    answers = ask(asker, TURNS, max_seconds=0)
    assert 0 <= len(answers) <= generation.BATCH
    whole = ask(asker, TURNS)
    assert all(whole[key] == answer for key, answer in answers.items())


def test_a_question_that_is_too_long_for_the_model_is_left_out(asker):
    long = Turn(99, 1, [message("user", "a " * 400)], "b")
    assert ask(asker, [long, TURNS[0]]).keys() == {TURNS[0].key}


def test_an_answer_knows_whether_it_was_cut(asker):
    answers = ask(asker, TURNS).values()
    cut = {answer.is_ended for answer in answers}
    greedy = dataclasses.replace(asker, generation=Generation(max_new_tokens=1))
    assert False in cut
    assert not any(answer.is_ended for answer in ask(greedy, TURNS[:3]).values())


def test_fewer_questions_are_some_of_more():
    few, more = draw(TURNS, 5), draw(TURNS, 20)
    assert len(few) == 5 and len(more) == 20 and set(map(id, few)) <= set(map(id, more))
    assert few == draw(TURNS, 5)
    assert draw(TURNS, "all") == draw(TURNS, 100) == TURNS
    assert draw(TURNS, 0) == []


def test_every_response_of_a_conversation_is_generated_from_its_true_history(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, '
        '{"role": "assistant", "content": "d"}]}\n'
        '{"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]}\n',
        encoding="utf-8",
    )
    data = Data(path=str(file), reader="messages", template="question_answer")
    found = turns_of(data)
    assert [turn.reference for turn in found] == ["b", "d", "f"]
    assert [[m["content"] for m in turn.history] for turn in found] == [
        ["s", "a"],
        ["s", "a", "b", "c"],
        ["e"],
    ]
    assert [turn.key for turn in found] == [(0, 2), (0, 4), (1, 1)]
    assert [turn.reference for turn in turns_of(data, [1])] == ["f"]


def test_a_turn_that_is_not_trained_or_only_calls_a_function_is_not_asked_for(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add"},
        {"role": "assistant", "content": "two"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    data = Data(path=str(file), reader="messages", template="question_answer")
    (turn,) = turns_of(data)
    assert (turn.key, turn.reference) == ((0, 3), "two")


def test_a_text_that_answers_nothing_is_not_asked_for(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "Once upon a time."}), encoding="utf-8")
    assert turns_of(Data(path=str(file), reader="text", template="text", loss_on="all")) == []
