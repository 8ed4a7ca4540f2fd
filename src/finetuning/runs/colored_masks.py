"""Examples as they are trained on: the prompt grey, what the loss is computed on green."""

import heapq
from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from finetuning.data.examples import IGNORE_INDEX, Example, Examples, sequences_of
from finetuning.runs.terminal import GREY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Colours of tokens that are not trained, that are, and that are of a rejected response.
PROMPT, RESPONSE, REJECTED = GREY, "bold green", "bold red"


def print_example(console: Console, example: Example, tokenizer: "PreTrainedTokenizerFast") -> None:
    """The text of one example, prompt grey and response green."""
    console.print(coloured(example, tokenizer))
    console.rule(style=PROMPT)


def coloured(example: Example, tokenizer: "PreTrainedTokenizerFast") -> Text:
    """Of a pair the prompt, the chosen response and, on a line of its own, the rejected one."""
    text = Text()
    for part, colour in zip(sequences_of(example), (RESPONSE, REJECTED), strict=False):
        parts = split_by_mask(part, tokenizer)
        if text:
            text.append("\n")
            del parts[0]  # the same prompt
        for content, is_trained in parts:
            text.append(content, style=colour if is_trained else PROMPT)
    return text


def split_by_mask(example: Example, tokenizer: "PreTrainedTokenizerFast") -> list[tuple[str, bool]]:
    """The example's text in parts, and whether the tokens of each are trained.

    Neighbouring tokens are decoded together, so that characters of several tokens (Japanese, emoji)
    stay whole.
    """
    is_trained = example["labels"] != IGNORE_INDEX
    borders = np.flatnonzero(np.diff(is_trained)) + 1
    parts, shown = [], ""
    for end in [*borders.tolist(), len(is_trained)]:
        whole = str(tokenizer.decode(example["input_ids"][:end].tolist()))
        parts.append((whole[len(shown) :], bool(is_trained[end - 1])))
        shown = whole
    return parts


def examples_in_order(
    train: Examples, evaluation: Examples | None
) -> Iterator[tuple[str, int, Example]]:
    """(split, row, example) of every example, in the order of the rows."""
    parts = [
        zip(repeat(name), part.rows.tolist(), part, strict=False)
        for name, part in (("train", train), ("eval", evaluation))
        if part is not None
    ]
    return heapq.merge(*parts, key=lambda item: item[1])
