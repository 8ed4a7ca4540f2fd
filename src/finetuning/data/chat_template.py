"""The tokenizer's own chat template -> segments."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from finetuning.data.row import BadRow, Message
from finetuning.data.templates import Segment, fold_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# What a chat template that asks for the date is told, in training and in answering: with the date of the day the same
# rows had other ids tomorrow. Llama 3's templates write this one where the date cannot be asked for.
TODAY = datetime(2024, 7, 26)


DATE_PARTS = [f"%{letter}" for letter in ("-d", "-m", *"aAbBdeFHIjmMpSTyY")]


class ChatTemplate:
    """The chat template the tokenizer brings along.

    Every conversation is rendered by the template itself, once with its words and once with placeholders in their
    place: the second shows where the words stand, so that special tokens come from the template alone. The rendering up
    to a message plus the generation prompt is the prompt; what the message adds, through the end mark, the response.
    The tokenizer keeps its template as it is; only here it is always TODAY.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> re.Pattern[str]:
        """The tokenizer's special tokens in template text, with the white space they take along."""
        tokens = sorted(
            self.tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content)
        )
        texts = [
            (r"\s*" if token.lstrip else "")
            + re.escape(token.content)
            + (r"\s*" if token.rstrip else "")
            for token in tokens
        ]
        return re.compile("(" + "|".join(texts) + ")" if texts else r"(?!)")

    @cached_property
    def template(self) -> str:
        """The tokenizer's chat template; one that asks for the date has strftime_now as a macro, of TODAY."""
        template = self.tokenizer.get_chat_template()
        if "strftime_now" not in template:
            return template
        # A macro shadows the function that transformers offers; an argument to apply_chat_template must be plain data.
        written = "".join(f".replace({part!r}, {TODAY.strftime(part)!r})" for part in DATE_PARTS)
        # The line feed goes with the block's end, so that the template begins where a line begins, as before.
        return f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"

    @cached_property
    def end_marks(self) -> list[str]:
        """The special tokens that end a response: the template's own and the end-of-text token."""
        segments = self.render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        closing = [s.text.strip() for s in segments if s.is_response and s.is_special]
        return list(dict.fromkeys([*closing[-1:], *filter(None, [self.tokenizer.eos_token])]))

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The whole conversation. Raises BadRow where the template refuses it or rewrites what came before."""
        return self.segments(fold_context(messages))

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation and the template's generation prompt."""
        return self.segments(fold_context(messages), add_generation_prompt=True)

    def answer(self, text: str) -> str:
        """The assistant's words in a generated response."""
        return text

    def segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[Segment]:
        pieces = self.pieces(messages, add_generation_prompt)
        turns = [
            number for number, message in enumerate(messages) if message["role"] == "assistant"
        ]
        return self.split(
            pieces, [self.response_span(messages, number, pieces) for number in turns]
        )

    def apply(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if not messages:
            raise BadRow("the tokenizer's chat template needs a message before the first response")
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise BadRow(
                f"the tokenizer's chat template refuses the conversation: {error}"
            ) from None

    def pieces(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[tuple[str, int | None]]:
        """The rendering in pieces of (text, number of the message whose words it is; None if it is the template's)."""
        text = self.apply(messages, add_generation_prompt)
        marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
        marked = self.apply(
            [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)],
            add_generation_prompt,
        )
        before, *parts = re.split("\ue000(\\d+)\ue001", marked)
        pieces: list[tuple[str, int | None]] = [(before, None)]
        at = len(before)
        for number, behind in zip(map(int, parts[::2]), parts[1::2], strict=True):
            words = messages[number]["content"]
            forms = (
                words,
                words.strip(),
                words.rstrip(),
                words.lstrip(),
            )  # many templates trim some role's words
            found = next((form for form in forms if text.startswith(form + behind, at)), words)
            pieces += [(found, number), (behind, None)]
            at += len(found) + len(behind)
        if "".join(piece for piece, _ in pieces) != text:
            raise BadRow(
                "the tokenizer's chat template rewrites the words of a message; use another template"
            )
        return pieces

    def response_span(
        self, messages: Sequence[Message], number: int, pieces: list[tuple[str, int | None]]
    ) -> tuple[int, int]:
        """Where in the text of all pieces the response of message `number` starts and ends."""
        text = "".join(piece for piece, _ in pieces)
        prompt = self.apply(messages[:number], add_generation_prompt=True)
        until = self.apply(messages[: number + 1])
        if not (until.startswith(prompt) and text.startswith(until)):
            raise BadRow(
                f"turn {number}: the tokenizer's chat template rewrites earlier turns, so that the prompt of this "
                "response is not the beginning of the conversation; use another template, or one response a row"
            )
        ends = accumulate(len(piece) for piece, _ in pieces)
        end_of_words = next(
            (end for end, (_, owner) in zip(ends, pieces, strict=True) if owner == number), 0
        )
        end_mark = self.special.search(until, max(end_of_words, len(prompt)))
        return len(prompt), end_mark.end() if end_mark else len(until)

    def split(
        self, pieces: list[tuple[str, int | None]], responses: list[tuple[int, int]]
    ) -> list[Segment]:
        """Pieces cut at special tokens and at the borders of responses."""
        segments: list[Segment] = []
        at = 0
        borders = sorted({border for span in responses for border in span})
        for text, owner in pieces:
            for part in self.special.split(text) if owner is None else [text]:
                cuts = [
                    at,
                    *(border for border in borders if at < border < at + len(part)),
                    at + len(part),
                ]
                for start, end in pairwise(cuts):
                    words = part[start - at : end - at]
                    is_response = any(first <= start < last for first, last in responses)
                    is_special = owner is None and bool(self.special.fullmatch(words))
                    segments.append(Segment(words, is_response, is_special))
                at += len(part)
        return [segment for segment in segments if segment.text]
