"""What is wrong with the data: findings among examples, each with the examples that show it."""

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from finetuning.runs.near_copies import near_copies

Part = tuple[str, bool]  # text, and whether it is trained

# UTF-8 that was read as Latin-1 or Windows-1252 and written again, and characters that were lost.
MOJIBAKE = re.compile("\ufffd|[ÃÂ][\u0080-\u00bf]|â€|ã[\u0080-\u0083‚ƒ\u0081]|ï¼|ðŸ")
JAPANESE = re.compile("[\u3040-\u30ff]")
LETTERS = re.compile(r"[^\W\d_]")
# A text of 200 bytes or more that packs to a sixth says little: prose packs to a half or a third.
REPEATED, LONG_ENOUGH = 6, 200
LONG_RESPONSE = 40  # characters from which a response is hardly the same by chance


@dataclass(frozen=True)
class Shown:
    """An example as text."""

    number: int
    row: int
    split: str
    parts: Sequence[Part]

    @property
    def prompt(self) -> str:
        return "".join(text for text, is_trained in self.parts if not is_trained)

    @property
    def response(self) -> str:
        return "".join(text for text, is_trained in self.parts if is_trained)


ByText = dict[str, list[Shown]]  # examples by a text that they have


@dataclass(frozen=True)
class Finding:
    kind: str
    """a key of KINDS"""
    groups: list[list[int]]
    """numbers of the examples that show it, those that belong together in one group"""


def diagnose(examples: Iterable[Shown], end_marks: Sequence[str]) -> list[Finding]:
    """Every kind of KINDS, in its order; without groups where nothing is wrong."""
    stripped = [
        (each, plain(each.prompt, end_marks), plain(each.response, end_marks)) for each in examples
    ]
    of_prompt, of_response = defaultdict(list), defaultdict(list)
    answers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for each, prompt, response in stripped:
        prompt, response = prompt.casefold(), response.casefold()
        of_prompt[prompt].append(each)
        of_response[response].append(each)
        answers[prompt][response].append(each.number)
    groups = {
        "leaked": leaked(of_prompt, of_response),
        "copies": [same for each in answers.values() for same in each.values() if len(same) > 1],
        "contradictions": [
            [same[0] for same in each.values()] for each in answers.values() if len(each) > 1
        ],
        "same_response": [numbers_of(each) for text, each in several(of_response) if text],
        "near_prompts": nearly_same(of_prompt),
        "near_responses": nearly_same(of_response),
    }
    for kind, holds in OF_ONE.items():
        groups[kind] = [
            [each.number] for each, prompt, response in stripped if holds(prompt, response)
        ]
    return [Finding(kind, groups[kind]) for kind in KINDS]


def several(examples: ByText) -> list[tuple[str, list[Shown]]]:
    """Texts that more than one example has."""
    return [(text, group) for text, group in examples.items() if len(group) > 1]


def leaked(of_prompt: ByText, of_response: ByText) -> list[list[int]]:
    """Examples of both splits with the same prompt, or the same long response."""
    same = [group for _, group in several(of_prompt)]
    same += [group for text, group in several(of_response) if len(text) >= LONG_RESPONSE]
    return [numbers_of(group) for group in same if len({each.split for each in group}) > 1]


def nearly_same(examples: ByText) -> list[list[int]]:
    """Of {text: examples that have it}, numbers of an example of each text of a group.

    What all texts begin and end with is of the template, and makes none like another.
    """
    texts = list(examples)
    lead = shared_beginning(texts)
    tail = shared_beginning([text[:lead:-1] for text in texts])
    inner = [text[lead : len(text) - tail] for text in texts]
    return [[examples[texts[place]][0].number for place in group] for group in near_copies(inner)]


def shared_beginning(texts: Sequence[str]) -> int:
    """Characters that all texts begin with: as many as the first and the last in order share."""
    pairs = zip(min(texts, default=""), max(texts, default=""), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def numbers_of(group: Iterable[Shown]) -> list[int]:
    return [each.number for each in group]


def plain(text: str, end_marks: Sequence[str]) -> str:
    """Without end marks, and with single spaces."""
    for mark in end_marks:
        text = text.replace(mark, " ")
    return " ".join(text.split())


def is_one_word(text: str) -> bool:
    """Japanese writes no spaces between words: there, of at most four characters."""
    return len(text.split()) == 1 and len(text) <= (4 if JAPANESE.search(text) else 20)


def is_repetitive(text: str) -> bool:
    content = text.encode(errors="replace")
    return len(content) >= LONG_ENOUGH and len(content) > REPEATED * len(zlib.compress(content))


def language(text: str) -> str:
    if JAPANESE.search(text):
        return "Japanese"
    return "other" if LETTERS.search(text) else ""


OF_ONE: dict[str, Callable[[str, str], bool]] = {
    "empty": lambda prompt, response: not response,
    "one_word": lambda prompt, response: is_one_word(response),
    "mojibake": lambda prompt, response: bool(MOJIBAKE.search(prompt + response)),
    "repetitive": lambda prompt, response: is_repetitive(response),
    "other_language": lambda prompt, response: (
        {"Japanese", "other"} == {language(prompt), language(response)}
    ),
}
# What a person is told; a kind without groups is not shown.
KINDS = {
    "leaked": "prompt or long response on both sides of the evaluation split",
    "copies": "the same prompt and response",
    "contradictions": "one prompt, different responses",
    "same_response": "one response to different examples",
    "near_prompts": "prompts that are nearly the same",
    "near_responses": "responses that are nearly the same",
    "empty": "empty response",
    "one_word": "response of one word",
    "mojibake": "broken characters (mojibake)",
    "repetitive": "response that repeats itself",
    "other_language": "Japanese on one side, another language on the other",
}
