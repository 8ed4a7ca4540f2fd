"""Texts that are nearly the same are found, whatever their number, and others are not."""

import itertools
import random

from finetuning.runs.doctor import Shown, diagnose
from finetuning.runs.near_copies import ALIKE, SHORTEST, WIDTH, near_copies

WORDS = [f"{a}{b}" for a in ("ka", "to", "mi", "re") for b in ("ran", "sil", "vo", "dem")]


def sentences(count, seed=0, words=30):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


def alike(one, other):
    """Plain Python's Jaccard likeness."""
    first, second = (
        {text[n : n + WIDTH] for n in range(len(text) - WIDTH + 1)} for text in (one, other)
    )
    return len(first & second) / len(first | second)


def test_pairs_are_those_of_a_comparison_of_each_with_each():
    texts = sentences(60)
    for number in range(0, 40, 2):  # changed in more and more places
        words = texts[number].split()
        for place in range(number // 4):
            words[place * 3] = "other"
        texts[number + 1] = " ".join(words) + "!"
    pairs = itertools.combinations(range(len(texts)), 2)
    expected = {pair for pair in pairs if alike(*(texts[n] for n in pair)) >= ALIKE}
    assert 3 < len(expected) < 20
    assert {tuple(group) for group in near_copies(texts)} == expected


def test_a_chain_of_texts_is_one_group_and_short_texts_are_none():
    (text,) = sentences(1)
    assert near_copies([text + "x" * n for n in range(4)]) == [[0, 1, 2, 3]]
    short = "a" * (SHORTEST - 1)
    assert near_copies([short, short + "b", "日本語の文" * 3]) == []
    assert near_copies([]) == []


def test_japanese_that_differs_in_a_word_is_nearly_the_same():
    text = "東京は日本の首都であり、世界でも有数の大都市として知られ、人口は約千四百万人です。"
    text += "隣の県にも多くの人が住んでいます。"
    other = "大阪は日本の西にあり、食文化の豊かな商業の街として栄え、人口は約九百万人。"
    assert near_copies([text, other, text.replace("有数", "屈指")]) == [[0, 2]]


def test_what_the_template_writes_makes_no_prompt_like_another():
    lead = "Below is an instruction that describes a task. Write a response that completes it.\n\n"
    prompts = [f"{lead}{text}\n### Answer:" for text in sentences(4, words=8)]
    prompts.append(prompts[2].replace("\n###", " please\n###"))
    examples = [
        Shown(n, n, "train", [(prompt, False), (answer, True)])
        for n, (prompt, answer) in enumerate(zip(prompts, sentences(5, seed=1), strict=True))
    ]
    found = {each.kind: each.groups for each in diagnose(examples, [])}
    assert found["near_prompts"] == [[2, 4]] and found["near_responses"] == []
