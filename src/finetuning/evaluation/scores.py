"""One answer against its reference -> scores, all in percent.

exact_match  the same after NFKC, with white space and case evened out
char_f1      F1 of the characters, white space left out: Japanese has no words
chrf         chrF of sacrebleu
rouge_l      F1 of the longest common subsequence of tokens: ROUGE-L as rouge-score computes it
length       characters of the answer, of 100 in the reference
ended        by itself: not cut off at generation.max_new_tokens
repeated     says something three times in a row
"""

import re
import unicodedata
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF

SCORES = {
    "exact_match": "exact match",
    "char_f1": "character F1",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "length": "length",
    "ended": "ended",
    "repeated": "repeated",
}
BETTER_IF_HIGHER = ("exact_match", "char_f1", "chrf", "rouge_l")

# A word; a character of those scripts that write no spaces between words: kana, kanji, Thai to
# Khmer. rouge-score's own tokenizer knows a to z and digits only, and is equal on these.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
REPETITION = re.compile(r"(.{4,100}?)\1\1", re.DOTALL)


def score(answer: str, reference: str, is_ended: bool) -> dict[str, float]:
    """Every score of one answer, 0..100; only `length` can be more."""
    said, expected = normalised(answer), normalised(reference)
    return {
        "exact_match": 100.0 * (said == expected),
        "char_f1": char_f1(said, expected),
        "chrf": chrf().sentence_score(answer, [reference]).score,
        "rouge_l": rouge_l(answer, reference),
        "length": 100.0 * len(answer) / max(1, len(reference)),
        "ended": 100.0 * is_ended,
        "repeated": 100.0 * bool(REPETITION.search(answer)),
    }


def normalised(text: str) -> str:
    """NFKC, without differences of case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def char_f1(said: str, expected: str) -> float:
    """As SQuAD's F1 of words, but of characters; two empty texts are the same."""
    found, wanted = (Counter("".join(text.split())) for text in (said, expected))
    if not found and not wanted:
        return 100.0
    return 200.0 * (found & wanted).total() / (found.total() + wanted.total())


def rouge_l(answer: str, reference: str) -> float:
    """rouge-score brings nltk and three more, and takes a second for a long answer: not here."""
    from rapidfuzz.distance import LCSseq

    said, expected = rouge_tokens(answer), rouge_tokens(reference)
    if not said or not expected:
        return 0.0
    return 200.0 * LCSseq.similarity(said, expected) / (len(said) + len(expected))


def rouge_tokens(text: str) -> list[str]:
    return TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


@cache
def chrf() -> "CHRF":
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def signature() -> str:
    """How sacrebleu was asked, in its own notation."""
    scorer: Any = chrf()
    scorer.sentence_score("a", ["a"])
    return f"chrF|{scorer.get_signature().format(short=False)}"
