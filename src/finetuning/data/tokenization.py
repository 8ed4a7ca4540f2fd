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
import secrets
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from finetuning.data.examples import (
    IGNORE_INDEX,
    Counts,
    Examples,
    Ids,
    first_tokens,
    ranges,
    sums,
)
from finetuning.data.templates import Segment
from finetuning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WINDOW = 64  # characters on either side of a border, in which a merge that crosses it is found
REMEMBERED = 2**16  # words, and borders of prompt and response: 20 MB at most
PROBED = 64  # conversations that are compared with what the tokenizer itself makes of them
# A single space between two words: GPT-2's pre-tokenizer always begins a new piece there, whatever
# stands around, and BPE never merges across pieces. Python counts a little more as white space than
# the tokenizer does, which is the safe side.
WORD_BORDER = re.compile(r"(?<=\S)(?= \S)")

# In front of the names of special tokens, where texts are encoded: no row can spell it.
SECRET = f"\ue002{secrets.token_hex(8)}"

Context = tuple[str | None, str]
"""TextSpan.before and after"""
CONTINUED: Context = (None, "")
SPECIAL: Context = (None, "special token")


class Exceptions(NamedTuple):
    """(examples,) which have other ids than the tokenizer gives their text as a whole, and why."""

    spelled: NDArray[np.bool_]
    """text of a row spells a special token, and stays text"""
    merged: NDArray[np.bool_]
    """a merge would cross the end of a prompt, which is kept as generation asks with it"""


class TextSpan(NamedTuple):
    """Neighbouring segments that are encoded as one text."""

    text: str
    is_trained: bool
    is_special: bool
    before: str | None
    """the special token (and the white space that it includes) in front of it, "" at the beginning
    of the text; None if other text is in front of it"""
    after: str
    """the special token behind it, if that includes the white space in front of itself"""


def tokenize(conversations: list[list[Segment]], tokenizer: "PreTrainedTokenizerFast") -> Examples:
    """One example for each list of segments, uncut, in order; its responses are trained.

    The first token of an example is never predicted, so it is never trained.
    """
    encoder = encoder_of(tokenizer, str(tokenizer.added_tokens_decoder))
    spans_of_each = [encoder.spans(segments) for segments in conversations]
    spans = list(chain.from_iterable(spans_of_each))
    spans_in_each = np.fromiter(map(len, spans_of_each), np.int64, len(spans_of_each))
    input_ids, tokens_in_span = encoder.encode(spans)
    lengths = sums(tokens_in_span, spans_in_each)

    is_trained_span = np.array([span.is_trained for span in spans], bool)  # (spans,)
    is_trained = np.repeat(is_trained_span, tokens_in_span)  # (tokens,)
    is_trained[first_tokens(lengths)] = False
    labels = np.where(is_trained, input_ids, np.int32(IGNORE_INDEX))
    return Examples(input_ids, labels, lengths, np.arange(len(conversations)))


def exceptions(
    conversations: list[list[Segment]], tokenizer: "PreTrainedTokenizerFast"
) -> Exceptions:
    """The examples that no other program makes of the saved tokenizer and its chat template."""
    encoder = encoder_of(tokenizer, str(tokenizer.added_tokens_decoder))
    spelled = [encoder.spells_special(segments) for segments in conversations]
    merged = [encoder.merges(encoder.spans(segments)) for segments in conversations]
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


class Encoder:
    """Encodes texts as the tokenizer itself does, without reading special tokens out of row text.

    In the tokenizer's copy that encodes, special tokens have secret names: only the template can
    write them. What a tokenizer does around a special token (a space in front of a text, white
    space that the token includes) is left to it: a text is encoded together with the special token
    in front of it. A response that continues ordinary text gets no space in front.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        backend = tokenizer.backend_tokenizer
        self.added_tokens = {
            token.content: token for token in backend.get_added_tokens_decoder().values()
        }
        self.token_to_id = backend.token_to_id
        self.plain = with_secret_names(backend)
        self.continued = without_prefix_space(self.plain)
        self.spelled = spellings(backend)
        self.known_merges: dict[tuple[str, str], bool] = {}
        self.known_words: dict[str, list[int]] = {}
        self.is_wordwise = self.plain is self.continued and splits_at_spaces(self.plain)

    def spans(self, segments: list[Segment]) -> list[TextSpan]:
        """Neighbouring ordinary segments of one kind joined; special tokens alone."""
        spans: list[TextSpan] = []
        before: str | None = ""
        for (is_response, is_special, is_trained), group in groupby(segments, lambda s: s[1:]):
            texts = [segment.text for segment in group]
            for text in filter(None, texts if is_special else ["".join(texts)]):
                if is_special and spans and self.added_tokens[text].lstrip:
                    spans[-1] = spans[-1]._replace(after=self.secret_name(text))
                spans.append(TextSpan(text, is_response and is_trained, is_special, before, ""))
                before = self.before_next(spans[-1])
        return spans

    def before_next(self, span: TextSpan) -> str | None:
        """TextSpan.before of the next span."""
        if span.is_special:
            return self.secret_name(span.text)
        if span.before is None or not span.text.isspace():
            return None
        before = span.before + span.text
        is_included = len(self.plain_ids(before)) == len(self.plain_ids(span.before))
        return before if is_included else None

    def spells_special(self, segments: list[Segment]) -> bool:
        """Whether text that is no special token spells one, which other programs would read."""
        texts = [segment.text for segment in segments if not segment.is_special]
        return any(self.spelled.search(text) for text in texts)

    def merges(self, spans: list[TextSpan]) -> bool:
        """Whether a merge would cross a border of prompt and response, were they one text."""
        return any(
            span.before is None and self.is_merged(previous.text, span.text)
            for previous, span in pairwise(spans)
            if not previous.is_special and not span.is_special
        )

    def is_merged(self, left: str, right: str) -> bool:
        words = WORD_BORDER.split(left)[-1][-WINDOW:], WORD_BORDER.split(right)[0][:WINDOW]
        if words not in self.known_merges:
            if len(self.known_merges) > REMEMBERED:
                self.known_merges.clear()
            apart = [*chain.from_iterable(self.ids(CONTINUED, [*words]))]
            together = self.continued.encode("".join(words), add_special_tokens=False)
            # A run of characters that a Unigram model does not know is one piece, whatever its ids.
            crossing = any(start < len(words[0]) < end for start, end in together.offsets)
            self.known_merges[words] = crossing or together.ids != apart
        return self.known_merges[words]

    def secret_name(self, token: str) -> str:
        return SECRET + token if self.added_tokens[token].special else token

    def encode(self, spans: Sequence[TextSpan]) -> tuple[Ids, Counts]:
        """Token ids of all spans, one after another (tokens,), and how many each has (spans,).

        A span is one piece of text, or with GPT-2's kind of tokenizer its words, and every distinct
        piece is encoded once: words repeat, and encoding takes most of the time of preparing.
        """
        tables: dict[Context, dict[str, int]] = {}  # piece -> its number
        numbers: list[int] = []  # (pieces,) among those of its context
        contexts, pieces_in_span = [], []
        for span in spans:
            context, pieces = self.split(span)
            table = tables.setdefault(context, {})
            numbers += [table.setdefault(piece, len(table)) for piece in pieces]
            contexts.append(context)
            pieces_in_span.append(len(pieces))

        sizes = np.array([len(table) for table in tables.values()], np.int64)
        offsets = dict(zip(tables, np.cumsum(sizes) - sizes, strict=True))
        offset_of_span = np.array([offsets[context] for context in contexts], np.int64)
        piece = np.array(numbers, np.int64) + np.repeat(offset_of_span, pieces_in_span)

        ids_of = [ids for context in tables for ids in self.known(context, list(tables[context]))]
        lengths = np.fromiter(map(len, ids_of), np.int64, len(ids_of))  # (distinct pieces,)
        starts = np.cumsum(lengths) - lengths
        flat = np.fromiter(chain.from_iterable(ids_of), np.int32, lengths.sum())
        tokens = flat[ranges(starts[piece], lengths[piece])]
        return tokens, sums(lengths[piece], np.array(pieces_in_span, np.int64))

    def split(self, span: TextSpan) -> tuple["Context", list[str]]:
        """The pieces of a span that may be encoded apart, and what they are encoded with."""
        if span.is_special:
            return SPECIAL, [span.text]
        if self.is_wordwise:
            return CONTINUED, WORD_BORDER.split(span.text)
        return (span.before, span.after), [span.text]

    def known(self, context: "Context", pieces: list[str]) -> list[list[int]]:
        """The ids of each piece. Those of words are remembered: the next texts have them too."""
        if not self.is_wordwise or context == SPECIAL:
            return self.ids(context, pieces)
        if len(self.known_words) > REMEMBERED:
            self.known_words.clear()
        new = [piece for piece in pieces if piece not in self.known_words]
        self.known_words.update(zip(new, self.ids(context, new), strict=True))
        return [self.known_words[piece] for piece in pieces]

    def ids(self, context: "Context", pieces: list[str]) -> list[list[int]]:
        """The ids of each piece."""
        if context == SPECIAL:
            return [[self.special_id(piece)] for piece in pieces]
        before, after = context
        if before is None:
            encodings = encode_texts(self.continued, [piece + after for piece in pieces])
        else:
            encodings = encode_texts(self.plain, [before + piece + after for piece in pieces])
        first = len(self.plain_ids(before or ""))
        last = len(self.plain_ids(after))
        return [ids[first : len(ids) - last] for ids in encodings]

    def plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.plain.encode(text, add_special_tokens=False).ids
        return ids

    def special_id(self, token: str) -> int:
        number = self.token_to_id(token)
        assert number is not None, f"the tokenizer has no token {token!r}"
        return number


def spellings(tokenizer: Tokenizer) -> re.Pattern[str]:
    """What the tokenizer itself reads as a special token, or as a byte of a Unigram model."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = tokenizer.get_added_tokens_decoder().values()
    texts = [re.escape(token.content) for token in tokens if token.special]
    if model["type"] == "Unigram" and model.get("byte_fallback"):
        texts.append("<0x[0-9A-F]{2}>")
    return re.compile("|".join(texts) if texts else r"(?!)")


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
    added_tokens = tokenizer.get_added_tokens_decoder().values()
    return is_gpt2 and all(
        token.special and not (token.lstrip or token.rstrip or token.single_word)
        for token in added_tokens
    )


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def with_secret_names(tokenizer: Tokenizer) -> Tokenizer:
    """A copy whose special tokens have secret names, so that no text of a row spells one.

    `encode_special_tokens` is not enough: a Unigram model has special tokens among its pieces
    (llm-jp's does) and finds them, and those of byte fallback (`<0x0A>`), in any text.
    """
    settings = json.loads(tokenizer.to_str())
    special = [token["content"] for token in settings["added_tokens"] if token["special"]]
    secret = {content: SECRET + content for content in special}
    for token in settings["added_tokens"]:
        token["content"] = secret.get(token["content"], token["content"])
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {secret.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[secret.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
    settings.update(post_processor=None, truncation=None, padding=None)
    renamed = Tokenizer.from_str(json.dumps(settings))
    if model["type"] == "Unigram" and model.get("byte_fallback"):
        apart = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
        renamed.pre_tokenizer = pre_tokenizers.Sequence([*steps_of(renamed.pre_tokenizer), apart])
    return renamed


def without_prefix_space(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that puts nothing in front of a text: a copy, or the same if it never does."""
    # A normalizer that adds to a plain letter adds to every text: Prepend, or Replace of its start.
    kept = [step for step in steps_of(tokenizer.normalizer) if step.normalize_str("a") == "a"]
    if len(kept) == len(steps_of(tokenizer.normalizer)) and not any(
        map(may_prefix, steps_of(tokenizer.pre_tokenizer))
    ):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
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
