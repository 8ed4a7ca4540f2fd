"""The tokenizer's own chat template -> segments."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from finetuning.data.row import BadRow, Message, message
from finetuning.data.templates import Segment, fold_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The date that a chat template gets when it asks for one: with the current date the same rows would
# have other ids tomorrow. Llama 3's templates write this one where no date can be asked for.
TODAY = datetime(2024, 7, 26)
DATE_PARTS = [f"%{letter}" for letter in ("-d", "-m", *"aAbBdeFHIjmMpSTyY")]

Span = tuple[int, int]  # (start, end) in the rendered text


class Piece(NamedTuple):
    """A part of the rendered text: the content of a message, or text of the template."""

    text: str
    owner: int | None
    """number of the message whose content it is; None if it is the template's"""


class ChatTemplate:
    """The chat template of a tokenizer.

    The template itself renders every conversation, once with its content and once with placeholders
    instead: the second shows where content stands, so that special tokens come from the template
    alone. The rendering before a message plus the generation prompt is the prompt; what the message
    adds, through the end mark, is the response. The tokenizer keeps its template as it is; only
    here the date is always TODAY.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> re.Pattern[str]:
        """The tokenizer's added tokens in template text, with the white space they include."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        texts = [
            (r"\s*" if token.lstrip else "")
            + re.escape(token.content)
            + (r"\s*" if token.rstrip else "")
            for token in sorted(tokens, key=lambda token: -len(token.content))
        ]
        return re.compile("(" + "|".join(texts) + ")" if texts else r"(?!)")

    @cached_property
    def template(self) -> str:
        """The tokenizer's chat template, in which strftime_now is a macro that returns TODAY."""
        template = self.tokenizer.get_chat_template()
        if "strftime_now" not in template:
            return template
        # A macro shadows transformers' function; arguments of apply_chat_template must be data.
        replaced = "".join(f".replace({part!r}, {TODAY.strftime(part)!r})" for part in DATE_PARTS)
        macro = f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
        # The line feed goes with the block's end: the template still begins where a line begins.
        return f"{macro}\n{template}"

    @cached_property
    def end_marks(self) -> list[str]:
        """The special tokens that end a response: the template's own, and EOS."""
        segments = self.render([message("user", "a"), message("assistant", "b")])
        closing = [s.text.strip() for s in segments if s.is_response and s.is_special]
        eos = self.tokenizer.eos_token
        return list(dict.fromkeys([*closing[-1:], *([eos] if eos else [])]))

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The whole conversation.

        Raises BadRow where the template refuses it, or rewrites content or earlier turns.
        """
        return self.segments(fold_context(messages))

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation and the template's generation prompt. Raises BadRow as `render`."""
        return self.segments(fold_context(messages), add_generation_prompt=True)

    def strip_markers(self, text: str) -> str:
        return text

    def segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[Segment]:
        pieces = self.pieces(messages, add_generation_prompt)
        turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        responses = [self.response_span(messages, number, pieces) for number in turns]
        return self.split(pieces, responses)

    def apply(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if not messages:
            raise BadRow("the tokenizer's chat template needs a message before the first response")
        try:
            text = self.tokenizer.apply_chat_template(
                cast("Any", list(messages)),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise BadRow(
                f"the tokenizer's chat template refuses the conversation: {error}"
            ) from None
        return cast("str", text)

    def pieces(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[Piece]:
        """The rendered text, cut at the borders of each message's content."""
        text = self.apply(messages, add_generation_prompt)
        marked = self.apply(
            [message(turn["role"], f"\ue000{n}\ue001") for n, turn in enumerate(messages)],
            add_generation_prompt,
        )
        before, *parts = re.split("\ue000(\\d+)\ue001", marked)
        pieces = [Piece(before, None)]
        at = len(before)
        for number, after in zip(map(int, parts[::2]), parts[1::2], strict=True):
            content = messages[number]["content"]
            # Many templates strip the content of some roles.
            forms = (content, content.strip(), content.rstrip(), content.lstrip())
            found = next((form for form in forms if text.startswith(form + after, at)), content)
            pieces += [Piece(found, number), Piece(after, None)]
            at += len(found) + len(after)
        if "".join(piece.text for piece in pieces) != text:
            raise BadRow(
                "the tokenizer's chat template rewrites the content of a message; "
                "use another template"
            )
        return pieces

    def response_span(self, messages: Sequence[Message], number: int, pieces: list[Piece]) -> Span:
        """Where in the text of all pieces the response of message `number` starts and ends."""
        text = "".join(piece.text for piece in pieces)
        prompt = self.apply(messages[:number], add_generation_prompt=True)
        until = self.apply(messages[: number + 1])
        if not (until.startswith(prompt) and text.startswith(until)):
            raise BadRow(
                f"turn {number}: the tokenizer's chat template rewrites earlier turns, so that the "
                "prompt of this response is not the beginning of the conversation; use another "
                "template, or one response a row"
            )
        ends = accumulate(len(piece.text) for piece in pieces)
        ends_of_content = (
            end for end, piece in zip(ends, pieces, strict=True) if piece.owner == number
        )
        end_of_content = next(ends_of_content, 0)
        end_mark = self.special.search(until, max(end_of_content, len(prompt)))
        return len(prompt), end_mark.end() if end_mark else len(until)

    def split(self, pieces: list[Piece], responses: list[Span]) -> list[Segment]:
        """Pieces cut at special tokens and at the borders of responses."""
        segments: list[Segment] = []
        borders = sorted({border for span in responses for border in span})
        at = 0
        for piece in pieces:
            is_template = piece.owner is None
            for part in self.special.split(piece.text) if is_template else [piece.text]:
                end = at + len(part)
                cuts = [at, *(border for border in borders if at < border < end), end]
                for start, stop in pairwise(cuts):
                    text = part[start - at : stop - at]
                    is_response = any(first <= start < last for first, last in responses)
                    is_special = is_template and bool(self.special.fullmatch(text))
                    segments.append(Segment(text, is_response, is_special))
                at = end
        return [segment for segment in segments if segment.text]
