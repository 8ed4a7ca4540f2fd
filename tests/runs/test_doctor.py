"""What is wrong with the data is found, and nothing where nothing is."""

import pytest

from finetuning.runs.doctor import KINDS, Shown, diagnose

LONG = "A long answer that nobody writes twice by chance."
EOS = "</s>"


def shown(*pairs, split=()):
    """Examples of (prompt, response); those whose numbers are in `split` are evaluated on."""
    return [
        Shown(n, n, "eval" if n in split else "train", [(prompt, False), (response + EOS, True)])
        for n, (prompt, response) in enumerate(pairs)
    ]


def found(examples):
    return {each.kind: each.groups for each in diagnose(examples, [EOS]) if each.groups}


def test_good_data_has_no_findings():
    assert (
        found(shown(("What is two and two?", "It is four."), ("どこ？", "日本にあります。"))) == {}
    )
    assert [finding.kind for finding in diagnose([], [EOS])] == list(KINDS)


def test_a_prompt_or_a_long_response_on_both_sides_is_a_leak():
    pairs = [
        ("a?", "one two"),
        ("b?", LONG),
        ("A? ", "three four"),
        ("c?", LONG),
        ("d?", "one two"),
    ]
    assert found(shown(*pairs, split=(2, 3)))["leaked"] == [[0, 2], [1, 3]]
    assert "leaked" not in found(shown(*pairs))


def test_copies_and_contradictions_are_told_apart():
    pairs = [("a?", "yes it is"), ("a?", "yes it is"), ("a?", "no it is not"), ("b?", "so so")]
    assert found(shown(*pairs)) == {
        "copies": [[0, 1]],
        "contradictions": [[0, 2]],
        "same_response": [[0, 1]],
    }


@pytest.mark.parametrize(
    ("kind", "bad", "good"),
    [
        ("empty", ("a?", " "), ("a?", "it is four")),
        ("one_word", ("a?", "Yes."), ("a?", "Yes, it is.")),
        ("one_word", ("a?", "はい"), ("a?", "はい、東京は日本の首都であり、人口は最大です。")),
        ("mojibake", ("cafÃ©", "it is four"), ("café Ãi", "it is four")),
        ("mojibake", ("a?", "itâ€™s four"), ("a?", "it’s four")),
        ("mojibake", ("ã\u0081\u0082", "it is four"), ("são", "it is four")),
        ("mojibake", ("a?", "lost \ufffd it"), ("a?", "lost ? it")),
        ("repetitive", ("a?", "I do not know. " * 40), ("a?", " ".join(map(str, range(200))))),
        ("other_language", ("どこですか", "It is here."), ("Where?", "It is here.")),
        ("other_language", ("Where is it?", "ここです。"), ("どこ？", "ここです。2 番目。")),
    ],
)
def test_a_bad_example_is_found_and_a_good_one_is_not(kind, bad, good):
    assert found(shown(bad)).get(kind) == [[0]]
    assert kind not in found(shown(good))
