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
    prompts, responses = defaultdict(list), defaultdict(list)
    for each, prompt, response in stripped:
        prompts[prompt.casefold()].append((each, response.casefold()))
        responses[response.casefold()].append(each)
    same_prompt = [group for group in prompts.values() if len(group) > 1]
    copies, contradictions = [], []
    for group in same_prompt:
        of_answer = defaultdict(list)
        for each, answer in group:
            of_answer[answer].append(each.number)
        copies += [numbers for numbers in of_answer.values() if len(numbers) > 1]
        if len(of_answer) > 1:
            contradictions.append([numbers[0] for numbers in of_answer.values()])
    same = [*([each for each, _ in group] for group in same_prompt)]
    same += [group for text, group in responses.items() if len(text) >= 40 and len(group) > 1]
    leaked = [numbers_of(group) for group in same if len({each.split for each in group}) > 1]
    repeated = [numbers_of(group) for text, group in responses.items() if len(group) > 1 and text]
    groups = {
        "leaked": leaked,
        "copies": copies,
        "contradictions": contradictions,
        "same_response": repeated,
        "near_prompts": nearly_same(
            {text: [each for each, _ in group] for text, group in prompts.items()}
        ),
        "near_responses": nearly_same(responses),
        **{
            kind: [[each.number] for each, prompt, response in stripped if holds(prompt, response)]
            for kind, holds in OF_ONE.items()
        },
    }
    return [Finding(kind, groups[kind]) for kind in KINDS]


def nearly_same(examples: dict[str, list[Shown]]) -> list[list[int]]:
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
