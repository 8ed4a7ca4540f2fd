"""Segments -> {input_ids, labels}.

    segments   "### Question: Hi\\n### Answer:" prompt | " Hello!" response | "<eos>" response
    input_ids  [21017, 18233, 25, 15902, 198, 21017, 23998, 25,  |  18435, 0,  |  50256]
    labels     [ -100,  -100, -100, -100, -100, -100, -100, -100, |  18435, 0,  |  50256]

Neighbouring segments of one kind are encoded as one text; prompt and response are encoded apart, so
that the ids of a prompt are the first ids of every example that starts with it, and the mask needs
no search.
"""

from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuning.data.encoder import Encoder, TextSpan
from finetuning.data.examples import (
    IGNORE_INDEX,
    Examples,
    first_tokens,
    sums,
)
from finetuning.data.templates import Segment
from finetuning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBED = 8  # conversations of a block, compared with what the tokenizer itself makes of them


class Exceptions(NamedTuple):
    """(examples,) which have other ids than the tokenizer gives their text as a whole, and why."""

    spelled: NDArray[np.bool_]
    """text of a row spells a special token, and stays text"""
    merged: NDArray[np.bool_]
    """a merge would cross the end of a prompt, which is kept as generation asks with it"""


def tokenize(conversations: list[list[Segment]], tokenizer: "PreTrainedTokenizerFast") -> Examples:
    """One example for each list of segments, uncut, in order; its responses are trained."""
    return examples_of(spans_of(conversations, tokenizer), tokenizer)


def spans_of(
    conversations: list[list[Segment]], tokenizer: "PreTrainedTokenizerFast"
) -> list[list[TextSpan]]:
    """The segments of each conversation, joined to what is encoded as one text."""
    encoder = encoder_of(tokenizer, str(tokenizer.added_tokens_decoder))
    return [encoder.spans(segments) for segments in conversations]


def examples_of(
    conversations: list[list[TextSpan]], tokenizer: "PreTrainedTokenizerFast"
) -> Examples:
    """One example for each conversation, uncut, in order; its responses are trained.

    The first token of an example is never predicted, so it is never trained.
    """
    encoder = encoder_of(tokenizer, str(tokenizer.added_tokens_decoder))
    spans = list(chain.from_iterable(conversations))
    spans_in_each = np.fromiter(map(len, conversations), np.int64, len(conversations))
    input_ids, tokens_in_span = encoder.encode(spans)
    lengths = sums(tokens_in_span, spans_in_each)

    is_trained_span = np.array([span.is_trained for span in spans], bool)  # (spans,)
    is_trained = np.repeat(is_trained_span, tokens_in_span)  # (tokens,)
    is_trained[first_tokens(lengths)] = False
    labels = np.where(is_trained, input_ids, np.int32(IGNORE_INDEX))
    return Examples(input_ids, labels, lengths, np.arange(len(conversations)))


def exceptions(
    conversations: list[list[TextSpan]], tokenizer: "PreTrainedTokenizerFast"
) -> Exceptions:
    """The examples that no other program makes of the saved tokenizer and its chat template."""
    encoder = encoder_of(tokenizer, str(tokenizer.added_tokens_decoder))
    spelled = [encoder.spells_special(spans) for spans in conversations]
    merged = [encoder.merges(spans) for spans in conversations]
    return Exceptions(np.array(spelled, bool), np.array(merged, bool))


def require_special_tokens_found(
    conversations: list[list[Segment]], known: Exceptions, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Raises UserError where the tokenizer itself finds other special tokens in the first texts.

    Such as one that normalizes them: with a space put in front, it does not find them in a text.
    Other programs would ask what is trained with other ids.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {token.content: id for id, token in added if token.special}
    for number in np.flatnonzero(~known.spelled)[:PROBED]:
        texts = [segment.text for segment in conversations[number]]
        written = [segment.text for segment in conversations[number] if segment.is_special]
        read = tokenizer("".join(texts), add_special_tokens=False).input_ids
        expected = [special[token] for token in written if token in special]
        if [id for id in read if id in special.values()] != expected:
            raise UserError(
                "model.name: its tokenizer does not find the template's special tokens in a text, "
                "so that other programs would ask the trained model with other ids; in its "
                f'tokenizer.json "normalized" is true for {normalized_tokens(tokenizer) or "none"},'
                ' expected "normalized": false'
            )


def normalized_tokens(tokenizer: "PreTrainedTokenizerFast") -> str:
    tokens = tokenizer.added_tokens_decoder.values()
    return ", ".join(token.content for token in tokens if token.special and token.normalized)


def encode_prompts(
    prompts: list[list[Segment]], tokenizer: "PreTrainedTokenizerFast"
) -> list[list[int]]:
    """Token ids of each prompt: the first ids of every training example that starts with it."""
    encoder = encoder_of(tokenizer, str(tokenizer.added_tokens_decoder))
    return [encoder.encode(encoder.spans(segments))[0].tolist() for segments in prompts]


@lru_cache(maxsize=1)
def encoder_of(tokenizer: "PreTrainedTokenizerFast", added_tokens: str) -> "Encoder":
    """The tokenizer's encoder, kept for the next call: 0.2 s for GPT-2, 3 s for 250,000 tokens.

    `added_tokens` are the part of a tokenizer that may change in place: with others, a new encoder.
    """
    return Encoder(tokenizer)
