"""Scores of one answer: the numbers of sacrebleu and rouge-score, and our own by hand."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf

from finetuning.evaluation.scores import SCORES, char_f1, normalised, rouge_l, rouge_tokens, score

PIECES = [
    *("Tokyo", "東京", "です。", "The quick  brown fox", "ＡＢＣ１２３", "abc123"),
    *("ﾄｳｷｮｳ", "か\u3099", "🗼", "👨\u200d👩\u200d👧", "...", "、。！？", "\n", "\t", " "),
    *("", "##\x1b[31m", "<b>", "é", "ß"),
    *("to be, or not to be", "1,234.5", "_snake_case_", "สวัสดี", "한국어", "x" * 300),
]


def hostile_pairs() -> list[tuple[str, str]]:
    """200 pairs of answer and reference: empty, very long, only punctuation, emoji, mixed width."""
    draw = random.Random(0)

    def text() -> str:
        return draw.choice(["", " "]).join(draw.choices(PIECES, k=draw.randrange(12)))

    pairs = [(text(), text()) for _ in range(170)]
    same = [(words, words) for words in (text() for _ in range(20))]
    long = [(text() * 40, text() * 40) for _ in range(6)]
    return [*pairs, *same, *long, ("", ""), ("", "a"), ("a", ""), ("...", "!!!")]


class OurTokens:
    """Our tokens, for rouge-score to count with."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_tokens(text)


def test_chrf_is_sacrebleus():
    pairs = hostile_pairs()
    assert len(pairs) == 200
    ours = [score(said, expected, True)["chrf"] for said, expected in pairs]
    assert ours == [sentence_chrf(said, [expected]).score for said, expected in pairs]
    assert 0 < sum(ours) / len(ours) < 100


def test_rouge_l_is_what_rouge_score_computes_from_the_same_tokens():
    scorer = RougeScorer(["rougeL"], tokenizer=OurTokens())
    for said, expected in hostile_pairs():
        theirs = 100 * scorer.score(expected, said)["rougeL"].fmeasure
        assert rouge_l(said, expected) == pytest.approx(theirs, abs=1e-9), (said, expected)


def test_the_tokens_of_english_are_rouge_scores_own():
    scorer = RougeScorer(["rougeL"])
    pairs = [(said, expected) for said, expected in hostile_pairs() if (said + expected).isascii()]
    pairs += [("The cat_sat on the mat.", "the cat sat, on a mat!"), ("It's 3.5 %", "its 3,5%")]
    for said, expected in pairs:
        theirs = 100 * scorer.score(expected, said)["rougeL"].fmeasure
        assert rouge_l(said, expected) == pytest.approx(theirs, abs=1e-9), (said, expected)


def test_japanese_is_compared_by_characters():
    assert rouge_tokens("東京は Japan の首都") == ["東", "京", "は", "japan", "の", "首", "都"]
    assert rouge_l("東京です", "東京") == pytest.approx(200 * 2 / 6)
    assert char_f1("東京です", "東京") == pytest.approx(200 * 2 / 6)


def test_width_case_and_white_space_make_no_other_answer():
    assert normalised(" Ｔｏｋｙｏ\n ") == normalised("tokyo")
    assert score("ＴＯＫＹＯ ", "tokyo", True)["exact_match"] == 100
    assert score("tokyo!", "tokyo", True)["exact_match"] == 0
    assert char_f1("to kyo", "tokyo") == 100


def test_an_answer_that_was_cut_or_repeats_itself_is_seen():
    loop = score("yes. " + "and so on, " * 5, "yes.", is_ended=False)
    assert (loop["ended"], loop["repeated"]) == (0, 100)
    assert loop["length"] == pytest.approx(100 * 60 / 4)
    plain = score("yes, yes. It is 1000000.", "yes.", is_ended=True)
    assert (plain["ended"], plain["repeated"]) == (100, 0)


def test_every_pair_has_every_score_between_0_and_100():
    for said, expected in hostile_pairs():
        found = score(said, expected, True)
        assert found.keys() == SCORES.keys()
        bounded = {name: value for name, value in found.items() if name != "length"}
        assert all(0 <= value <= 100 for value in bounded.values()), (said, expected, found)
