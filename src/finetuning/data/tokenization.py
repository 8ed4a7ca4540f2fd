"""Segments -> {input_ids, labels}.

    segments   "### Question: Hi\\n### Answer:" prompt | " Hello!" response | "<eos>" response
    input_ids  [21017, 18233, 25, 15902, 198, 21017, 23998, 25,  |  18435, 0,  |  50256]
    labels     [ -100,  -100, -100, -100, -100, -100, -100, -100, |  18435, 0,  |  50256]

Neighbouring segments of one kind are encoded as one text; prompt and response are encoded apart, so
that the ids of a prompt are the first ids of every example that starts with it, and the mask needs
no search.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import lru_cache
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tqdm import tqdm

from finetuning.data.templates import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100  # label of a token that is left out of the loss; torch's default
BLOCK = 16384  # texts encoded in one call: enough for every core, small enough for a progress bar
# A single space between two words: GPT-2's pre-tokenizer always begins a new piece there, whatever
# stands around, and BPE never merges across pieces. Python counts a little more as white space than
# the tokenizer does, which is the safe side.
WORD_BORDER = re.compile(r"(?<=\S)(?= \S)")

Ids = NDArray[np.int32]
Counts = NDArray[np.int64]


class Example(TypedDict):
    """One sequence of T tokens."""

    input_ids: Ids  # (T,)
    labels: Ids  # (T,), IGNORE_INDEX where the token is not trained


@dataclass(frozen=True)
class Examples:
    """Tokenized examples, one after another in flat arrays."""

    input_ids: Ids  # (tokens of all examples,)
    labels: Ids  # (tokens of all examples,)
    lengths: Counts  # (examples,)
    rows: Counts  # (examples,) number of the row an example was made from

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        for start, end in zip(self.ends - self.lengths, self.ends, strict=True):
            yield {"input_ids": self.input_ids[start:end], "labels": self.labels[start:end]}

    @property
    def ends(self) -> Counts:
        """(examples,) where in the flat arrays each example ends."""
        return np.cumsum(self.lengths)

    def select(self, numbers: Counts, max_length: int | None = None) -> "Examples":
        """The examples of these numbers, in this order, with repeats; cut to max_length tokens."""
        starts = (self.ends - self.lengths)[numbers]
        lengths = np.minimum(self.lengths[numbers], max_length or np.inf).astype(np.int64)
        tokens = ranges(starts, lengths)
        return Examples(self.input_ids[tokens], self.labels[tokens], lengths, self.rows[numbers])


class TextSpan(NamedTuple):
    """Neighbouring segments that are encoded as one text."""

    text: str
    is_response: bool
    is_special: bool
    is_first: bool
    """no ordinary text stands before it in the example"""


def tokenize(
    conversations: list[list[Segment]],
    tokenizer: "PreTrainedTokenizerFast",
    loss_on: str = "response",
) -> Examples:
    """One example for each list of segments, uncut, in order.

    The first token of an example is never predicted, so it is never trained.
    """
    spans_of_each = [spans_of(segments) for segments in conversations]
    spans = list(chain.from_iterable(spans_of_each))
    spans_in_each = np.fromiter(map(len, spans_of_each), np.int64, len(spans_of_each))
    input_ids, tokens_in_span = Encoder(tokenizer).encode(spans)
    lengths = sums(tokens_in_span, spans_in_each)
    starts = np.cumsum(lengths) - lengths

    is_trained_span = np.array([span.is_response or loss_on == "all" for span in spans], bool)
    is_trained = np.repeat(is_trained_span, tokens_in_span)
    is_trained[starts[lengths > 0]] = False
    labels = np.where(is_trained, input_ids, np.int32(IGNORE_INDEX))
    return Examples(input_ids, labels, lengths, np.arange(len(conversations)))


def encode_prompts(
    prompts: list[list[Segment]], tokenizer: "PreTrainedTokenizerFast"
) -> list[list[int]]:
    """Token ids of each prompt: the first ids of every training example that starts with it."""
    encoder = encoder_of(tokenizer, str(tokenizer.added_tokens_decoder))
    return [encoder.encode(spans_of(segments))[0].tolist() for segments in prompts]


@lru_cache(maxsize=1)
def encoder_of(tokenizer: "PreTrainedTokenizerFast", added_tokens: str) -> "Encoder":
    """The tokenizer's encoder, kept for the next prompt: 0.2 s for GPT-2, 3 s for 250,000 tokens.

    `added_tokens` are the part of a tokenizer that may change in place: with others, a new encoder.
    """
    return Encoder(tokenizer)


def spans_of(segments: list[Segment]) -> list[TextSpan]:
    """Neighbouring ordinary segments of one kind joined; special tokens alone; no empty text."""
    spans: list[TextSpan] = []
    is_first = True
    for (is_response, is_special), group in groupby(segments, key=lambda s: s[1:]):
        texts = [segment.text for segment in group]
        for text in texts if is_special else ["".join(texts)]:
            if text:
                spans.append(TextSpan(text, is_response, is_special, is_first))
                is_first = is_first and is_special
    return spans


class Kind(IntEnum):
    """How a text is encoded."""

    SPECIAL = auto()
    FIRST = auto()
    """the first ordinary text of an example"""
    CONTINUED = auto()
    """an ordinary text that follows another"""


class Encoder:
    """Encodes texts without ever reading a special token out of them.

    Most SentencePiece-style tokenizers put a space before a text; in front of a response that
    continues a prompt it would be a token of its own, so only the first text of an example gets it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.token_to_id = tokenizer.backend_tokenizer.token_to_id
        self.first = without_special_tokens(tokenizer.backend_tokenizer)
        self.continued = without_prefix_space(self.first)
        self.is_wordwise = self.first is self.continued and splits_at_spaces(self.continued)

    def encode(self, spans: Sequence[TextSpan]) -> tuple[Ids, Counts]:
        """Token ids of all spans, one after another (tokens,), and how many each has (spans,).

        A span is one piece of text, or with GPT-2's kind of tokenizer its words, and every distinct
        piece is encoded once: words repeat, and encoding takes most of the time of preparing.
        """
        tables: dict[Kind, dict[str, int]] = {kind: {} for kind in Kind}  # piece -> its number
        numbers: list[int] = []  # (pieces,) among those of its kind
        kinds, pieces_in_span = [], []
        for span in spans:
            kind, pieces = self.split(span)
            table = tables[kind]
            numbers += [table.setdefault(piece, len(table)) for piece in pieces]
            kinds.append(kind)
            pieces_in_span.append(len(pieces))

        sizes = np.array([len(table) for table in tables.values()])
        offsets = dict(zip(tables, np.cumsum(sizes) - sizes, strict=True))
        offset_of_span = np.array([offsets[kind] for kind in kinds], np.int64)
        piece = np.array(numbers, np.int64) + np.repeat(offset_of_span, pieces_in_span)

        ids_of = [ids for kind in Kind for ids in self.encode_pieces(kind, list(tables[kind]))]
        lengths = np.fromiter(map(len, ids_of), np.int64, len(ids_of))  # (distinct pieces,)
        starts = np.cumsum(lengths) - lengths
        flat = np.fromiter(chain.from_iterable(ids_of), np.int32, lengths.sum())
        tokens = flat[ranges(starts[piece], lengths[piece])]
        return tokens, sums(lengths[piece], np.array(pieces_in_span, np.int64))

    def split(self, span: TextSpan) -> tuple[Kind, list[str]]:
        """The pieces of a span that may be encoded apart."""
        if span.is_special:
            return Kind.SPECIAL, [span.text]
        if self.is_wordwise:
            return Kind.CONTINUED, WORD_BORDER.split(span.text)
        return Kind.FIRST if span.is_first else Kind.CONTINUED, [span.text]

    def encode_pieces(self, kind: Kind, pieces: list[str]) -> list[list[int]]:
        """The ids of each piece."""
        if kind is Kind.SPECIAL:
            return [[self.special_id(piece)] for piece in pieces]
        return encode_texts(self.first if kind is Kind.FIRST else self.continued, pieces)

    def special_id(self, text: str) -> int:
        for spelling in (text, text.strip()):  # some include the white space beside them
            token = self.token_to_id(spelling)
            if token is not None:
                return token
        raise AssertionError(f"the tokenizer has no token {text!r}")


def ranges(starts: Counts, lengths: Counts) -> Counts:
    """start, start + 1, ... start + length - 1 of each, one after another (sum of lengths,)."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def sums(values: Counts, counts: Counts) -> Counts:
    """The sum of the first counts[0] values, of the next counts[1], and so on (counts,)."""
    totals = np.append(0, np.cumsum(values))
    ends = np.cumsum(counts)
    summed: Counts = totals[ends] - totals[ends - counts]
    return summed


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether words may be encoded one by one.

    So it is with GPT-2's kind of pre-tokenizer, if no normalizer and no added token looks further.
    """
    step = tokenizer.pre_tokenizer
    is_gpt2 = (
        isinstance(step, pre_tokenizers.ByteLevel)
        and step.use_regex
        and tokenizer.normalizer is None
    )
    return is_gpt2 and all(token.special for token in tokenizer.get_added_tokens_decoder().values())


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    blocks = tqdm(
        range(0, len(texts), BLOCK), desc="tokenizing", disable=None, leave=False, delay=1
    )
    encodings = (
        tokenizer.encode_batch_fast(texts[n : n + BLOCK], add_special_tokens=False) for n in blocks
    )
    return [encoding.ids for block in encodings for encoding in block]


def without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy to which the spelling of a special token is ordinary text.

    `encode_special_tokens` alone is not enough: a Unigram model has special tokens among its pieces
    (llm-jp's does) and finds them, and those of byte fallback (`<0x0A>`), in any text.
    """
    settings = json.loads(tokenizer.to_str())
    special = [token["content"] for token in settings["added_tokens"] if token["special"]]
    hidden = {content: f"\ue002{content}" for content in special}
    for token in settings["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    settings.update(post_processor=None, truncation=None, padding=None)
    plain = Tokenizer.from_str(json.dumps(settings))
    plain.encode_special_tokens = True
    if model["type"] == "Unigram":
        spelled = "\ue002|<(?=0x[0-9A-F]{2}>)" if model.get("byte_fallback") else "\ue002"
        apart = pre_tokenizers.Split(Regex(spelled), "isolated")
        plain.pre_tokenizer = pre_tokenizers.Sequence([*steps_of(plain.pre_tokenizer), apart])
    return plain


def without_prefix_space(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that puts nothing in front of a text: a copy, or the same if it never does."""
    # A normalizer that adds to a plain letter adds to every text: Prepend, or Replace of its start.
    kept = [step for step in steps_of(tokenizer.normalizer) if step.normalize_str("a") == "a"]
    if len(kept) == len(steps_of(tokenizer.normalizer)) and not any(
        map(may_prefix, steps_of(tokenizer.pre_tokenizer))
    ):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.encode_special_tokens = True  # a copy forgets it
    tokenizer.normalizer = normalizers.Sequence(kept)
    splitting = steps_of(tokenizer.pre_tokenizer)  # of the copy: steps belong to their tokenizer
    for step in filter(may_prefix, splitting):
        if isinstance(step, pre_tokenizers.Metaspace):
            step.prepend_scheme = "never"
        else:
            step.add_prefix_space = False
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitting)
    return tokenizer


def may_prefix(step: Any) -> bool:
    if isinstance(step, pre_tokenizers.ByteLevel):
        return bool(step.add_prefix_space)
    return isinstance(step, pre_tokenizers.Metaspace)


def steps_of(part: Any) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    is_sequence = isinstance(part, (normalizers.Sequence, pre_tokenizers.Sequence))
    return [*part] if is_sequence else [part]
