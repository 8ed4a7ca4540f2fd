"""Properties of what is trained, for any conversation, template and kind of tokenizer."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TOKENS, TOKENIZERS, byte_level, chat_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetuning.data import tokenization
from finetuning.data.chat_template import ChatTemplate
from finetuning.data.collator import Collator
from finetuning.data.context_turns import fold_context
from finetuning.data.examples import IGNORE_INDEX, train_on_all
from finetuning.data.templates import TEMPLATES, MarkerTemplate, Segment
from finetuning.data.tokenization import (
    Encoder,
    encode_prompts,
    exceptions,
    require_special_tokens_found,
    spans_of,
    tokenize,
)
from finetuning.errors import UserError


class Case(NamedTuple):
    """A template with one tokenizer, and what a response must be made of."""

    template: MarkerTemplate | ChatTemplate
    said: Callable[[str], str]
    """an assistant's content -> the text to be trained, without its end mark"""
    end: str


CHAT_ENDS = {
    "chatml": "<|im_end|>",
    "chatml_generation": "<|im_end|>",
    "llama_3": "<|eot_id|>",
    "vicuna": None,
}
MARKER_LEADS = {"question_answer": " ", "instruction_ja": "", "plain_chat": " "}


@cache
def tokenizer_of(kind):
    return chat_tokenizer(kind, "chatml")


@cache
def cases_of(kind):
    """Every template of this repository with this kind of tokenizer: {name: Case}."""
    tokenizer = tokenizer_of(kind)
    cases = {}
    for name in MARKER_LEADS:
        for newline in (None, "<NL>"):
            bos = tokenizer.bos_token if kind == "byte_fallback" else None
            template = MarkerTemplate(TEMPLATES[name], tokenizer.eos_token, bos, newline)

            def said(content, lead=MARKER_LEADS[name], newline=newline):
                return lead + (content.replace("\n", newline) if newline else content)

            cases[f"{name} {newline or ''}"] = Case(template, said, tokenizer.eos_token)
    for name, end in CHAT_ENDS.items():
        said = str.strip if name == "llama_3" else str
        cases[name] = Case(
            ChatTemplate(chat_tokenizer(kind, name)), said, end or tokenizer.eos_token
        )
    return cases


SPELLINGS = [
    *("<|endoftext|>", "<s>", "</s>", "<unk>", *CHAT_TOKENS, "<pad>", "[INST]"),
    *("<0x0A>", "<0xE3>", "<0xE3><0x81>", "<0x", "\ue002</s>", "\ue0000\ue001", "{{ bos_token }}"),
    *(
        "### Question: ",
        "### Answer:",
        "### 指示:\n",
        "### 回答:\n",
        "### 回答:",
        "User: ",
        "Assistant:",
        "assistant\n",
    ),
    *(
        "<NL>",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " ",
        "  ",
        "\u3000",
        "\u00a0",
        "\u200b",
        "\ufeff",
        "\x00",
    ),
    *(
        "👍🏽",
        "👩‍👩‍👧‍👦",
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "e\u0301",
        "が",
        "か\u3099",
        "日本の首都は",
        "東京です。",
        "한국어",
        "שלום",
        "Tokyo",
        "The quick",
    ),
]
# Not "▁": SentencePiece writes a space so, and decodes it to one. Surrogates are no characters.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
WORDS = st.lists(st.sampled_from(SPELLINGS) | st.text(LETTERS, max_size=4), max_size=5).map("".join)


def messages_of(role, content):
    return st.fixed_dictionaries({"role": st.just(role), "content": content})


@st.composite
def conversations(draw, content=WORDS):
    """Some turns with at least one response.

    Perhaps a system message, material, results of tools, a last question.
    """
    messages = draw(st.lists(messages_of("system", content), max_size=1))
    asking = st.lists(
        st.sampled_from(["context", "tool"]).flatmap(lambda role: messages_of(role, content)),
        max_size=1,
    )
    for _ in range(draw(st.integers(1, 3))):
        messages.append(draw(messages_of("user", content)))
        messages += draw(asking)
        messages.append(draw(messages_of("assistant", content)))
    return messages + draw(st.lists(messages_of("user", content), max_size=1))


def examples_of(kind, messages, change=lambda examples: examples):
    """(name, case, segments, ids, labels) for every template."""
    cases = cases_of(kind)
    rendered = [case.template.render(messages) for case in cases.values()]
    examples = change(tokenize(rendered, tokenizer_of(kind)))
    for (name, case), segments, example in zip(cases.items(), rendered, examples, strict=True):
        yield name, case, segments, example["input_ids"].tolist(), example["labels"].tolist()


def spelled(tokenizer, ids):
    """What ids spell in the middle of a text; a decoder may strip a space where a text begins."""
    return tokenizer.decode([tokenizer.eos_token_id, *ids]).removeprefix(tokenizer.eos_token)


def said_by(case, messages):
    return [case.said(message["content"]) for message in messages if message["role"] == "assistant"]


of_every_kind = pytest.mark.parametrize("kind", TOKENIZERS)
quickly = settings(max_examples=40, deadline=None, database=None)


@cache
def reader_of(kind):
    """The tokenizer as another program loads it from where it was saved."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_of(kind).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


@of_every_kind
@quickly
@given(messages=conversations())
def test_ids_and_mask_are_those_of_the_saved_tokenizer_and_its_chat_template(kind, messages):
    reader, tokenizer = reader_of(kind), tokenizer_of(kind)
    for name, case in cases_of(kind).items():
        reader.chat_template = case.template.jinja
        folded = fold_context(messages) if name in CHAT_ENDS else messages
        segments = case.template.render(messages)
        [example] = tokenize([segments], tokenizer)
        theirs = reader.apply_chat_template(
            folded, return_dict=True, return_assistant_tokens_mask=True
        )
        turns = [number for number, turn in enumerate(folded) if turn["role"] == "assistant"]
        others = exceptions(spans_of([segments], tokenizer), tokenizer)
        if others.spelled[0]:
            continue
        first = reader.apply_chat_template(
            folded[: turns[0]], add_generation_prompt=True, return_dict=False
        )
        [prompt] = encode_prompts([case.template.render_prompt(folded[: turns[0]])], tokenizer)
        assert prompt == first, name
        if others.merged[0]:
            continue
        assert example["input_ids"].tolist() == theirs["input_ids"], name
        is_trained = (example["labels"] != IGNORE_INDEX).tolist()
        assert is_trained == [bool(mask) for mask in theirs["assistant_masks"]], name
        for turn in turns:
            asked = reader.apply_chat_template(
                folded[:turn], add_generation_prompt=True, return_dict=False
            )
            assert example["input_ids"][: len(asked)].tolist() == asked, name


@of_every_kind
@quickly
@given(messages=conversations())
def test_what_is_trained_is_exactly_the_responses_with_their_end_marks(kind, messages):
    tokenizer = tokenizer_of(kind)
    for name, case, _, ids, labels in examples_of(kind, messages):
        trained = [token for token in labels if token != IGNORE_INDEX]
        responses = said_by(case, messages)
        assert spelled(tokenizer, trained) == "".join(
            response + case.end for response in responses
        ), name
        assert trained.count(tokenizer.convert_tokens_to_ids(case.end)) == len(responses), name
        assert all(
            label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True)
        ), name


@of_every_kind
@quickly
@given(messages=conversations())
def test_every_special_token_comes_from_the_template(kind, messages):
    tokenizer = tokenizer_of(kind)
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for name, _, segments, ids, _ in examples_of(kind, messages):
        from_template = [tokenizer.convert_tokens_to_ids(s.text) for s in segments if s.is_special]
        assert [token for token in ids if token in special] == from_template, name


@of_every_kind
@quickly
@given(messages=conversations())
def test_the_prompt_of_every_response_is_the_untrained_beginning_of_the_example(kind, messages):
    tokenizer = tokenizer_of(kind)
    for name, case, _, ids, labels in examples_of(kind, messages):
        turns = [
            number for number, message in enumerate(messages) if message["role"] == "assistant"
        ]
        prompts = encode_prompts(
            [case.template.render_prompt(messages[:turn]) for turn in turns], tokenizer
        )
        answered = 0  # tokens up to the end of the response before
        for prompt in prompts:
            assert ids[: len(prompt)] == prompt, name
            assert set(labels[answered : len(prompt)]) == {IGNORE_INDEX}, name
            answered = labels.index(tokenizer.convert_tokens_to_ids(case.end), len(prompt)) + 1
            assert labels[len(prompt) : answered] == ids[len(prompt) : answered], name
        assert set(labels[answered:]) <= {IGNORE_INDEX}, name


def reference_labels(segments, encoder):
    """Labels of an example, text by text: slow, and plain enough to be read."""
    labels = []
    for span in encoder.spans(segments):
        if span.is_special:
            tokens = [encoder.token_to_id(span.text)]
        elif span.before is None:
            tokens = encoder.continued.encode(span.text).ids
        else:
            before = encoder.plain.encode(span.before).ids
            tokens = encoder.plain.encode(span.before + span.text).ids[len(before) :]
        labels += tokens if span.is_trained else [IGNORE_INDEX] * len(tokens)
    return [IGNORE_INDEX, *labels[1:]][: len(labels)]


@of_every_kind
@quickly
@given(messages=conversations())
def test_labels_are_those_of_a_plain_reference(kind, messages):
    encoder = Encoder(tokenizer_of(kind))
    for name, _, segments, _, labels in examples_of(kind, messages):
        assert labels == reference_labels(segments, encoder), name


@of_every_kind
@quickly
@given(messages=conversations())
def test_with_loss_on_all_only_the_first_token_is_not_trained(kind, messages):
    for name, _, _, ids, labels in examples_of(kind, messages, train_on_all):
        assert labels == [IGNORE_INDEX, *ids[1:]], name


PLAIN_SEGMENTS = st.builds(Segment, WORDS, st.booleans(), st.just(False))
END_SEGMENTS = st.just(Segment("</s>", is_response=True, is_special=True))


@quickly
@given(rows=st.lists(st.lists(PLAIN_SEGMENTS | END_SEGMENTS, max_size=4), max_size=4))
def test_the_first_token_is_never_trained_even_if_a_response_begins_the_example(rows):
    tokenizer = tokenizer_of("byte_fallback")
    for change in (lambda examples: examples, train_on_all):
        examples = change(tokenize(rows, tokenizer))
        assert len(examples) == len(rows)
        for segments, example in zip(rows, examples, strict=True):
            [alone] = change(tokenize([segments], tokenizer))
            np.testing.assert_array_equal(example["input_ids"], alone["input_ids"])
            np.testing.assert_array_equal(example["labels"], alone["labels"])
            assert set(example["labels"][:1]) <= {IGNORE_INDEX}


@of_every_kind
@quickly
@given(messages=conversations(), data=st.data())
def test_a_cut_example_is_a_beginning_and_learns_no_false_end(kind, messages, data):
    tokenizer = tokenizer_of(kind)
    cases = cases_of(kind)
    whole = tokenize([case.template.render(messages) for case in cases.values()], tokenizer)
    limit = data.draw(st.integers(1, int(whole.lengths.max()) + 1))
    numbers = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=6)))
    cut = whole.select(numbers, limit)
    assert cut.rows.tolist() == whole.rows[numbers].tolist()
    for number, example in zip(numbers, cut, strict=True):
        uncut, case = list(whole)[number], list(cases.values())[number]
        assert example["input_ids"].tolist() == uncut["input_ids"][:limit].tolist()
        assert example["labels"].tolist() == uncut["labels"][:limit].tolist()
        trained = [token for token in example["labels"].tolist() if token != IGNORE_INDEX]
        spoken = "".join(response + case.end for response in said_by(case, messages))
        whole_characters = spelled(tokenizer, trained).rstrip(
            "\ufffd"
        )  # the cut may go through a character
        assert spoken.startswith(whole_characters)
        # An end mark is trained exactly where the example holds the whole response.
        end = tokenizer.convert_tokens_to_ids(case.end)
        closed = [at for at, label in enumerate(uncut["labels"]) if label == end and at < limit]
        assert [at for at, label in enumerate(example["labels"]) if label == end] == closed


@of_every_kind
@quickly
@given(messages=conversations())
def test_padding_with_the_end_mark_changes_nothing(kind, messages):
    tokenizer = tokenizer_of(kind)
    examples = list(
        tokenize([case.template.render(messages) for case in cases_of(kind).values()], tokenizer)
    )
    packed, padded = (
        Collator(layout, tokenizer.eos_token_id)(examples) for layout in ("packed", "padded")
    )
    rows = padded["input_ids"]
    for row, example, length in zip(rows, examples, padded["lengths"], strict=True):
        assert row[:length].tolist() == example["input_ids"][:length].tolist()
        assert set(row[length:].tolist()) <= {tokenizer.eos_token_id}
    # A position is that of the token before its target, in either layout.
    trained = [pair for example in examples for pair in predicted(example)]
    for batch in (packed, padded):
        before = batch["input_ids"].flatten()[batch["positions"]]
        assert pairs(before, batch["targets"]) == trained


def predicted(example):
    """(token before, target) of every trained token."""
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    return [(ids[at - 1], label) for at, label in enumerate(labels) if label != IGNORE_INDEX]


def pairs(ids, labels):
    return list(zip(ids.tolist(), labels.tolist(), strict=True))


HARMLESS = st.text(st.sampled_from("abe Tk\n\t#:,.0é日本東京👍"), min_size=1)


@of_every_kind
@quickly
@given(text=HARMLESS.filter(lambda text: text[0] != " "))
def test_harmless_text_gets_the_ids_the_tokenizer_itself_gives_it(kind, text):
    tokenizer = tokenizer_of(kind)
    [example] = tokenize([[Segment(text), Segment(f" {text}", is_response=True)]], tokenizer)
    first = tokenizer(text, add_special_tokens=False).input_ids
    # Where the tokenizer prepends a space, " a" within a text is what "a" is at its start.
    later = (
        tokenizer(f" {text}", add_special_tokens=False).input_ids if kind == "byte_level" else first
    )
    assert example["input_ids"].tolist() == first + later


@of_every_kind
def test_rows_of_100_kilobytes_keep_every_law(kind):
    tokenizer = tokenizer_of(kind)
    content = "".join(SPELLINGS)
    content *= 100_000 // len(content.encode()) + 1
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    for name, case, _, _, labels in examples_of(kind, messages):
        trained = [token for token in labels if token != IGNORE_INDEX]
        assert spelled(tokenizer, trained) == case.said(content) + case.end, name
        assert trained.count(tokenizer.convert_tokens_to_ids(case.end)) == 1, name


@of_every_kind
def test_encoding_leaves_the_tokenizer_as_it_was(kind):
    tokenizer = tokenizer_of(kind)
    before = tokenizer.backend_tokenizer.to_str()
    tokenize([[Segment("a</s><|endoftext|>")]], tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer(tokenizer.eos_token, add_special_tokens=False).input_ids == [
        tokenizer.eos_token_id
    ]


def with_prefix_space(kind, pre_tokenizer):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "first"),
    [
        (tokenizer_of("byte_level"), "a"),
        (tokenizer_of("metaspace"), "▁a"),
        (tokenizer_of("byte_fallback"), "▁a"),
        (with_prefix_space("byte_level", pre_tokenizers.ByteLevel(add_prefix_space=True)), "Ġa"),
        (
            with_prefix_space(
                "byte_fallback", pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            ),
            "▁a",
        ),
        (
            with_prefix_space("byte_fallback", pre_tokenizers.Metaspace(prepend_scheme="always")),
            "▁a",
        ),
    ],
)
def test_a_space_is_put_where_the_tokenizer_puts_it_and_not_in_front_of_a_response(
    tokenizer, first
):
    end = tokenizer.eos_token
    segments = [Segment("a"), Segment("b", True), Segment(end, True, True), Segment("a")]
    [example] = tokenize([segments], tokenizer)
    behind = tokenizer(f"{end}a", add_special_tokens=False).tokens()[1:]
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert "".join(tokens) == "".join([first, "b", end, *behind])


def with_normalized_tokens(kind):
    tokenizer = chat_tokenizer(kind, "chatml")
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["normalized"] = True
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)), eos_token=tokenizer.eos_token
    )


@of_every_kind
def test_a_tokenizer_that_does_not_find_its_own_special_tokens_is_refused(kind):
    tokenizer = with_normalized_tokens(kind)
    template = MarkerTemplate(TEMPLATES["question_answer"], tokenizer.eos_token)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "東京"}]
    segments = [template.render(messages)]
    known = exceptions(spans_of(segments, tokenizer), tokenizer)
    if kind != "byte_fallback":  # nothing is put in front of the token
        return require_special_tokens_found(segments, known, tokenizer)
    with pytest.raises(UserError, match=r'"normalized" is true for .*</s>'):
        require_special_tokens_found(segments, known, tokenizer)


def test_an_encoder_is_made_once_for_all_prompts_until_the_tokenizer_is_another(monkeypatch):
    made = []
    monkeypatch.setattr(
        tokenization, "Encoder", lambda tokenizer: made.append(tokenizer) or Encoder(tokenizer)
    )
    first, second = byte_level(), byte_level()
    for tokenizer in (first, first, second, second):
        assert encode_prompts([[Segment("Hello")]], tokenizer) == [first("Hello").input_ids]
    assert made == [first, second]


def test_a_token_that_is_added_is_known_to_the_next_prompt():
    tokenizer = byte_level()
    assert len(encode_prompts([[Segment("<NL>")]], tokenizer)[0]) > 1
    tokenizer.add_tokens(["<NL>"])
    assert encode_prompts([[Segment("<NL>")]], tokenizer) == [
        [tokenizer.convert_tokens_to_ids("<NL>")]
    ]
    tokenizer.add_tokens(["<NL>"], special_tokens=True)
    assert len(encode_prompts([[Segment("<NL>")]], tokenizer)[0]) > 1


def test_nothing_to_tokenize_gives_no_examples():
    tokenizer = tokenizer_of("byte_level")
    assert list(tokenize([], tokenizer)) == []
    assert encode_prompts([], tokenizer) == []
    assert [len(example["input_ids"]) for example in tokenize([[], [Segment("")]], tokenizer)] == [
        0,
        0,
    ]
