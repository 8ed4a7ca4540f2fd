"""The tokenizer's own chat template -> segments."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from finetuning.data.generation_marks import with_generation_marks, without_generation_marks
from finetuning.data.row import BadRow, Message, message
from finetuning.data.templates import Segment, fold_context, literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The date that a chat template gets when it asks for one: with the current date the same rows would
# have other ids tomorrow. Llama 3's templates write this one where no date can be asked for.
TODAY = datetime(2024, 7, 26)
DATE_PARTS = [f"%{letter}" for letter in ("-d", "-m", *"aAbBdeFHIjmMpSTyY")]
IS_CLOSED = "messages and messages[-1].role == 'assistant' and not add_generation_prompt"
MARK_AT_END = re.compile(rf"\{{\{{ \".*\" if {re.escape(IS_CLOSED)} else '' }}}}$")
PLACEHOLDER = "\ue000\ue001"  # content whose place in a rendering is looked for

Span = tuple[int, int]  # (start, end) in the rendered text


class Piece(NamedTuple):
    """A part of the rendered text: the content of a message, or text of the template."""

    text: str
    owner: int | None
    """number of the message whose content it is; None if it is the template's"""


class Closing(NamedTuple):
    """What ends a response of a chat template."""

    marks: list[tuple[str, str]]
    """(text, special token) one after another, behind the content of a response"""
    is_next_turn: bool = False
    """the mark belongs to the turn that follows (GLM), so that there is none behind the last"""


class ChatTemplate:
    """The chat template of a tokenizer.

    The template itself renders every conversation, once with its content and once with placeholders
    instead: the second shows where content stands, so that special tokens come from the template
    alone. The rendering before a message plus the generation prompt is the prompt; what the message
    adds, through the end mark, is the response.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> re.Pattern[str]:
        """The tokenizer's added tokens in template text."""
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        by_length = sorted(tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, by_length))})" if tokens else r"(?!)")

    @cached_property
    def dated(self) -> str:
        """The tokenizer's chat template, in which strftime_now is a macro that returns TODAY."""
        saved = without_generation_marks(self.tokenizer.get_chat_template())
        template = MARK_AT_END.sub("", saved)
        if "strftime_now" not in template or "macro strftime_now" in template:
            return template
        # A macro shadows transformers' function; arguments of apply_chat_template must be data.
        replaced = "".join(f".replace({part!r}, {TODAY.strftime(part)!r})" for part in DATE_PARTS)
        macro = f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
        # The line feed goes with the block's end: the template still begins where a line begins.
        return f"{macro}\n{template}"

    @cached_property
    def closing(self) -> Closing | None:
        """What ends a response in the tokenizer's template; None if nothing does."""
        if marks := self.leading_marks(self.tail([]), r"[\s\S]*?"):
            return Closing(marks)
        marks = self.leading_marks(self.tail([message("user", PLACEHOLDER)]), r"\s*")
        return Closing(marks[:1], is_next_turn=True) if marks else None

    def tail(self, following: list[Message]) -> str:
        """The template's text behind a response, up to the content of what follows."""
        turns = [message("user", "a"), message("assistant", PLACEHOLDER), *following]
        try:
            return self.apply(turns, template=self.dated).partition(PLACEHOLDER)[2]
        except BadRow:  # it refuses such a conversation
            return ""

    def leading_marks(self, text: str, gap: str) -> list[tuple[str, str]]:
        """Special tokens that follow each other at the beginning of the text, white space between.

        `gap` is what may stand in front of the first.
        """
        text = text.partition(PLACEHOLDER)[0]
        marks: list[tuple[str, str]] = []
        while found := re.compile(f"({gap}){self.special.pattern}").match(text):
            marks.append((found[1], found[2]))
            text, gap = text[found.end() :], r"\s*"
        return marks

    @cached_property
    def jinja(self) -> str:
        """The template that is saved: what is trained with, and marks around what is trained."""
        following = [gap + mark for gap, mark in self.closing.marks[1:]] if self.closing else []
        return with_generation_marks(self.unmarked, self.end_marks, following)

    @cached_property
    def unmarked(self) -> str:
        """The template that is trained with: the tokenizer's, with fixed date.

        Where it does not end the last response, an end mark is added: the token of the user's turn,
        or EOS behind every response if there is no mark at all.
        """
        if self.closing is None:
            return with_mark_in_content(self.dated, self.tokenizer.eos_token)
        if self.closing.is_next_turn:
            ((gap, mark),) = self.closing.marks
            return with_mark_at_end(self.dated, gap + mark)
        return self.dated

    @cached_property
    def end_marks(self) -> list[str]:
        eos = self.tokenizer.eos_token
        marks = [mark for _, mark in self.closing.marks] if self.closing else []
        if self.closing and self.closing.is_next_turn:
            tail = self.tail([message("tool", PLACEHOLDER)])
            marks += [mark for _, mark in self.leading_marks(tail, r"\s*")[:1]]
        return list(dict.fromkeys([*marks, *([eos] if eos else [])]))

    @property
    def added_end_mark(self) -> str | None:
        if self.closing is None:
            eos: str | None = self.tokenizer.eos_token
            return eos
        return self.closing.marks[0][1] if self.closing.is_next_turn else None

    @cached_property
    def response_lead(self) -> list[Segment]:
        text = self.lead_text
        return self.split([Piece(text[: len(text) - len(self.plain_lead())], None)], [])

    def plain_lead(self) -> str:
        """What of the text between prompt and content stands behind its last special token."""
        return self.special.split(self.lead_text)[-1]

    @cached_property
    def lead_text(self) -> str:
        question = message("user", "a")
        try:
            prompt = self.apply([question], add_generation_prompt=True)
            text = self.apply([question, message("assistant", PLACEHOLDER)])
        except BadRow:
            return ""
        return text.partition(PLACEHOLDER)[0][len(prompt) :] if text.startswith(prompt) else ""

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The whole conversation.

        Raises BadRow where the template refuses it, or rewrites content or earlier turns.
        """
        return self.segments(fold_context(messages))

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation and the template's generation prompt. Raises BadRow as `render`."""
        return self.segments(fold_context(messages), add_generation_prompt=True)

    def strip_markers(self, text: str) -> str:
        return text.removeprefix(self.plain_lead())

    def segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[Segment]:
        pieces = self.pieces(messages, add_generation_prompt)
        turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        responses = [self.response_span(messages, number, pieces) for number in turns]
        return self.split(pieces, responses)

    def apply(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        from jinja2 import TemplateError

        if not messages:
            raise BadRow("the tokenizer's chat template needs a message before the first response")
        try:
            text = self.tokenizer.apply_chat_template(
                cast("Any", list(messages)),
                chat_template=template or self.unmarked,
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
        ends = accumulate(len(piece.text) for piece in pieces)
        ends_of_content = (
            end for end, piece in zip(ends, pieces, strict=True) if piece.owner == number
        )
        end = max(next(ends_of_content, 0), len(prompt))
        if not (text.startswith(prompt) and text[:end] == until[:end]):
            raise BadRow(
                f"turn {number}: the tokenizer's chat template rewrites earlier turns, so that the "
                "prompt of this response is not the beginning of the conversation; use another "
                "template, or one response a row"
            )
        return len(prompt), self.end_of_response(text, end)

    def end_of_response(self, text: str, end: int) -> int:
        """Where the end marks end that begin at `end`, or `end` if there are none."""
        if self.closing and self.closing.is_next_turn:
            found = re.compile(rf"\s*{self.special.pattern}").match(text, end)
            return found.end() if found else end
        eos = self.tokenizer.eos_token or ""
        for gap, mark in self.closing.marks if self.closing else [("", eos)]:
            if not text.startswith(gap + mark, end):
                break
            end += len(gap + mark)
        return end

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


def with_mark_at_end(template: str, mark: str) -> str:
    """The chat template with an end mark behind the last response of a conversation."""
    # Jinja drops the line feed at the end of a template.
    return f"{template.removesuffix(chr(10))}{{{{ {literal(mark)} if {IS_CLOSED} else '' }}}}"


def with_mark_in_content(template: str, mark: str) -> str:
    """The chat template with an end mark behind the content of every response."""
    return (
        "{% set closed = namespace(messages=[]) %}{% for message in messages %}"
        "{% if message.role == 'assistant' %}"
        f"{{% set ended = dict(message, content=message.content ~ {literal(mark)}) %}}"
        "{% set closed.messages = closed.messages + [ended] %}"
        "{% else %}{% set closed.messages = closed.messages + [message] %}{% endif %}{% endfor %}"
        f"{{% set messages = closed.messages %}}\n{template}"
    )
