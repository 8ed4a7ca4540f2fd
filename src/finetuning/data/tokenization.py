"""Segments -> {input_ids, labels}.

    segments   "### Question: Hi\\n### Answer:" prompt | " Hello!" response | "<eos>" response, special
    input_ids  [21017, 18233, 25, 15902, 198, 21017, 23998, 25,  |  18435, 0,  |  50256]
    labels     [ -100,  -100, -100, -100, -100, -100, -100, -100, |  18435, 0,  |  50256]

Neighbouring segments of one kind are encoded as one text; prompt and response are encoded apart, so that the ids of a
prompt are the first ids of every example that starts with it, and the mask needs no search.
"""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tqdm import tqdm

from finetuning.data.templates import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


IGNORE_INDEX = -100  # label of a token that is left out of the loss; torch's default


BLOCK = (
    16384  # texts encoded in one call: enough for every core, small enough for a live progress bar
)


class Example(TypedDict):
    input_ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32, IGNORE_INDEX where the token is not trained


@dataclass(frozen=True)
class Examples:
    """Tokenized examples, one after another in flat arrays."""

    input_ids: np.ndarray  # (tokens of all examples,) int32
    labels: np.ndarray  # (tokens of all examples,) int32
    lengths: np.ndarray  # (examples,) int64
    rows: np.ndarray  # (examples,) int64: number of the row an example was made from

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        for start, end in zip(self.ends - self.lengths, self.ends, strict=True):
            yield {"input_ids": self.input_ids[start:end], "labels": self.labels[start:end]}

    @property
    def ends(self) -> np.ndarray:
        """(examples,) int64: where in the flat arrays each example ends."""
        return np.cumsum(self.lengths)

    def select(self, numbers: np.ndarray, max_length: int | None = None) -> "Examples":
        """The examples of these numbers, in their order, repeated ones repeated; only their first tokens if cut."""
        lengths = np.minimum(self.lengths[numbers], max_length or np.inf).astype(np.int64)
        shift = (self.ends - self.lengths)[numbers] - (np.cumsum(lengths) - lengths)
        tokens = np.repeat(shift, lengths) + np.arange(lengths.sum())
        return Examples(self.input_ids[tokens], self.labels[tokens], lengths, self.rows[numbers])


class TextSpan(NamedTuple):
    """Neighbouring segments that are encoded as one text."""

    text: str
    is_response: bool
    is_special: bool
    is_first: bool


class Encoder:
    """Encodes texts without ever reading a special token out of them.

    Most SentencePiece-style tokenizers put a space before a text; in front of a response that continues a prompt it
    would be a token of its own, so only the first text of an example gets it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.token_to_id = tokenizer.backend_tokenizer.token_to_id
        self.first = without_special_tokens(tokenizer.backend_tokenizer)
        self.rest = without_prefix_space(self.first)
        self.is_wordwise = self.first is self.rest and splits_at_spaces(self.rest)

    def encode(self, spans: list[TextSpan]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all spans, one after another (tokens,), and how many each span has (spans,).

        Every distinct text is encoded once; with GPT-2's kind of tokenizer every distinct word, which is where most of
        the time of tokenizing goes.
        """
        tables: tuple[dict[str, int], ...] = (
            {},
            {},
            {},
        )  # special tokens, first texts, other texts: text -> number
        kinds, pieces_of_span, numbers = [], [], []
        for span in spans:
            kind = (
                0 if span.is_special else 1 if span.is_first and self.first is not self.rest else 2
            )
            pieces = WORD_BORDER.split(span.text) if kind == 2 and self.is_wordwise else [span.text]
            table = tables[kind]
            numbers += [table.setdefault(piece, len(table)) for piece in pieces]
            kinds.append(kind)
            pieces_of_span.append(len(pieces))
        ids = [[self.special_id(text)] for text in tables[0]]
        ids += encode_texts(self.first, list(tables[1])) + encode_texts(self.rest, list(tables[2]))

        table_starts = np.cumsum([0, len(tables[0]), len(tables[1])])
        piece = np.array(numbers, np.int64) + np.repeat(
            table_starts[np.array(kinds, np.int64)], pieces_of_span
        )
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens_of_piece = lengths[piece]
        shift = (np.cumsum(lengths) - lengths)[piece] - (
            np.cumsum(tokens_of_piece) - tokens_of_piece
        )
        known = np.fromiter(chain.from_iterable(ids), np.int32, lengths.sum())
        tokens = known[np.repeat(shift, tokens_of_piece) + np.arange(tokens_of_piece.sum())]
        ends = np.cumsum(pieces_of_span, dtype=np.int64)
        return tokens, np.diff(
            np.concatenate([[0], np.cumsum(tokens_of_piece)])[np.concatenate([[0], ends])]
        )

    def special_id(self, text: str) -> int:
        token = self.token_to_id(text)
        return (
            self.token_to_id(text.strip()) if token is None else token
        )  # some take white space along


# A single space between two words: GPT-2's pre-tokenizer always begins a new piece there, whatever stands around, and
# BPE never merges across pieces. Python counts a little more as white space than the tokenizer does, which is the safe
# side.
WORD_BORDER = re.compile(r"(?<=\S)(?= \S)")


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether words may be encoded one by one: GPT-2's kind of pre-tokenizer, and nothing that looks beyond it."""
    splitting = tokenizer.pre_tokenizer
    is_gpt2 = (
        isinstance(splitting, pre_tokenizers.ByteLevel)
        and splitting.use_regex
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

    `encode_special_tokens` alone is not enough: a Unigram model has special tokens among its pieces (llm-jp's does) and
    finds them, and those of byte fallback (`<0x0A>`), in any text.
    """
    settings = json.loads(tokenizer.to_str())
    hidden = {
        token["content"]: f"\ue002{token['content']}"
        for token in settings["added_tokens"]
        if token["special"]
    }
    for token in settings["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {
            hidden.get(piece, piece): token for piece, token in model["vocab"].items()
        }
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
    # What adds to a plain letter adds to every text: normalizers Prepend, or Replace of the text's beginning.
    kept = [step for step in steps_of(tokenizer.normalizer) if step.normalize_str("a") == "a"]
    if len(kept) == len(steps_of(tokenizer.normalizer)) and not any(
        map(may_prefix, steps_of(tokenizer.pre_tokenizer))
    ):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.encode_special_tokens = True  # a copy forgets it
    tokenizer.normalizer = normalizers.Sequence(kept)
    splitting = steps_of(
        tokenizer.pre_tokenizer
    )  # the copy's own: steps are shared with the tokenizer they are from
    for step in filter(may_prefix, splitting):
        if isinstance(step, pre_tokenizers.Metaspace):
            step.prepend_scheme = "never"
        else:
            step.add_prefix_space = False
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitting)
    return tokenizer


def may_prefix(step: Any) -> bool:
    if isinstance(step, pre_tokenizers.ByteLevel):
        return step.add_prefix_space
    return isinstance(step, pre_tokenizers.Metaspace)


def steps_of(part: Any) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return (
        list(part) if isinstance(part, (normalizers.Sequence, pre_tokenizers.Sequence)) else [part]
    )


def spans_of(segments: list[Segment]) -> list[TextSpan]:
    """Neighbouring ordinary segments of one kind joined; special tokens alone. Empty text is left out."""
    spans: list[TextSpan] = []
    for (is_response, is_special), group in groupby(
        segments, key=lambda s: (s.is_response, s.is_special)
    ):
        texts = [segment.text for segment in group]
        for text in texts if is_special else ["".join(texts)]:
            if text:
                is_first = all(span.is_special for span in spans)
                spans.append(TextSpan(text, is_response, is_special, is_first))
    return spans


def encode_prompts(
    prompts: list[list[Segment]], tokenizer: "PreTrainedTokenizerFast"
) -> list[list[int]]:
    """Token ids of each prompt: the beginning of every training example that starts with these segments."""
    encoder = encoder_of(tokenizer, str(tokenizer.added_tokens_decoder))
    return [encoder.encode(spans_of(segments))[0].tolist() for segments in prompts]


@lru_cache(maxsize=1)
def encoder_of(tokenizer: "PreTrainedTokenizerFast", added_tokens: str) -> Encoder:
    """The tokenizer's encoder, kept for the next prompt: 0.2 s for GPT-2, 3 s for a vocabulary of 250,000.

    `added_tokens` are what may change of a tokenizer in place: with others it is another encoder.
    """
    return Encoder(tokenizer)


def tokenize(
    conversations: list[list[Segment]],
    tokenizer: "PreTrainedTokenizerFast",
    loss_on: str = "response",
) -> Examples:
    """One example for each list of segments, uncut, in order. The first token is never predicted, so never trained."""
    spans_of_each = [spans_of(segments) for segments in conversations]
    spans = [span for spans in spans_of_each for span in spans]
    input_ids, tokens_in_span = Encoder(tokenizer).encode(spans)
    is_trained = np.repeat(
        np.array([span.is_response or loss_on == "all" for span in spans], bool), tokens_in_span
    )
    spans_before = np.cumsum([0, *map(len, spans_of_each)])
    starts = np.concatenate([[0], np.cumsum(tokens_in_span)])[spans_before]
    is_trained[starts[:-1][starts[:-1] < len(is_trained)]] = False
    labels = np.where(is_trained, input_ids, np.int32(IGNORE_INDEX))
    return Examples(input_ids, labels, np.diff(starts), np.arange(len(conversations)))
