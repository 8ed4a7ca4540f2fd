"""Texts -> token ids as the tokenizer itself makes them; special tokens come of templates alone."""

from collections.abc import Sequence
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from finetuning.data.examples import Counts, Ids
from finetuning.data.plain_tokenizer import (
    SECRET,
    spellings,
    with_secret_names,
    without_prefix_space,
)
from finetuning.data.templates import Segment
from finetuning.data.words import WORD_BORDER, Words, splits_at_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WINDOW = 64  # characters on either side of a border, in which a merge that crosses it is found
REMEMBERED = 2**16  # borders of prompt and response

Context = tuple[str | None, str]
"""TextSpan.before and after"""
CONTINUED: Context = (None, "")
SPECIAL: Context = (None, "special token")


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
        is_wordwise = self.plain is self.continued and splits_at_spaces(self.plain)
        self.words = Words(self.plain) if is_wordwise else None

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

    def spells_special(self, spans: list[TextSpan]) -> bool:
        """Whether text that is no special token spells one, which other programs would read."""
        return any(self.spelled.search(span.text) for span in spans if not span.is_special)

    def merges(self, spans: list[TextSpan]) -> bool:
        """Whether a merge would cross a border of prompt and response, were they one text."""
        return any(
            span.before is None and self.is_merged(previous.text, span.text)
            for previous, span in pairwise(spans)
            if not previous.is_special and not span.is_special
        )

    def is_merged(self, left: str, right: str) -> bool:
        if self.words and WORD_BORDER.search(left[-1:] + right[:2]):
            return False
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
        """Token ids of all spans, one after another (tokens,), and how many each has (spans,)."""
        if self.words:
            return self.words.encode(map(self.words_of, spans))
        tables: dict[Context, dict[str, list[int]]] = {}  # every distinct text is encoded once
        for span in spans:
            tables.setdefault(context_of(span), {})[span.text] = []
        for context, table in tables.items():
            table.update(zip(table, self.ids(context, [*table]), strict=True))
        ids = [tables[context_of(span)][span.text] for span in spans]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, lengths.sum()), lengths

    def words_of(self, span: TextSpan) -> list[str]:
        return [self.secret_name(span.text)] if span.is_special else WORD_BORDER.split(span.text)

    def ids(self, context: Context, pieces: list[str]) -> list[list[int]]:
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


def context_of(span: TextSpan) -> Context:
    return SPECIAL if span.is_special else (span.before, span.after)


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
