"""Answers are the same in any order, in batches or alone, whole or word by word."""

import itertools

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuning.data.row import message
from finetuning.data.templates import TEMPLATES, MarkerTemplate
from finetuning.errors import UserError
from finetuning.inference.generation import BATCH, Asker, batches_by_length
from finetuning.inference.streaming import whole_words
from finetuning.recipe.sections import Generation

QUESTIONS = [f"What is {n} + {n}?" * (1 + n % 5) for n in range(BATCH + 3)]


@pytest.fixture(scope="module")
def asker() -> Asker:
    tokenizer = tiny.byte_level()
    model = tiny.model_of("gpt2", vocab_size=len(tokenizer))
    template = MarkerTemplate(TEMPLATES["question_answer"], tokenizer.eos_token)
    return Asker(model, tokenizer, template, Generation(max_new_tokens=12))


def test_each_answer_stands_where_its_question_stood(asker):
    alone = [asker([question])[0] for question in QUESTIONS]
    assert asker(QUESTIONS) == alone and asker(QUESTIONS[::-1]) == alone[::-1]


@given(lengths=st.lists(st.integers(1, 50), max_size=5 * BATCH))
def test_batches_hold_every_prompt_once_and_prompts_of_similar_length(lengths):
    batches = batches_by_length([[0] * length for length in lengths])
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert all(len(batch) <= BATCH and batch == sorted(batch) for batch in batches)
    spans = [[lengths[number] for number in batch] for batch in batches]
    assert all(max(one) <= min(next) for one, next in itertools.pairwise(spans))


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 2}])
def test_an_answer_word_by_word_is_the_answer(asker, settings):
    asker = Asker(
        asker.model, asker.tokenizer, asker.template, Generation(max_new_tokens=24, **settings)
    )
    pieces: list[str] = []
    answer = asker.stream([message("user", QUESTIONS[0])], pieces.append)
    assert "".join(pieces) == answer == asker(QUESTIONS[:1])[0]


def test_pieces_end_where_words_end(asker):
    pieces: list[str] = []
    for text in ("The qu", "The quick", "The quick brown", "The quick \ufffd", "東", "東京\ufffd"):
        pieces.append(whole_words(text))
    assert pieces == ["The ", "The ", "The quick ", "The quick ", "東", "東京"]


def test_what_was_said_before_is_in_the_prompt(asker):
    turns = [message("user", "Hi"), message("assistant", "Hello"), message("user", "Bye")]
    prompt = asker.tokenizer.decode(asker.prompt(turns))
    assert (
        prompt == "### Question: Hi\n### Answer: Hello<|endoftext|>\n### Question: Bye\n### Answer:"
    )


def test_asking_leaves_mode_and_random_numbers_alone(asker):
    asker.model.train()
    state = torch.get_rng_state()
    asker(QUESTIONS[:2])
    assert asker.model.training and torch.equal(torch.get_rng_state(), state)
    asker.model.eval()


def test_a_question_that_is_too_long_is_refused_by_its_length(asker):
    with pytest.raises(UserError, match=r"a question has \d+ tokens .* at most 256"):
        asker(["long " * 300])
