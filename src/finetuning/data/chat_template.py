"""The tokenizer's own chat template -> segments."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from finetuning.data.context_turns import fold_context
from finetuning.data.jinja_template import JinjaTemplate
from finetuning.data.named_templates import training_variant
from finetuning.data.rendered_text import (
    MARK,
    REPEATED,
    Piece,
    Rendering,
    Span,
    forms,
    with_numbers,
)
from finetuning.data.row import BadRow, Message, Tool
from finetuning.data.templates import Segment

THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
ANOTHER = "use another template"


class RewritesHistory(BadRow):
    """A response is written otherwise once turns follow it."""


class ChatTemplate(JinjaTemplate):
    """The chat template of a tokenizer as a Template.

    The template itself renders every conversation, once with its content and once with placeholders
    instead: the second shows where content stands, so that special tokens come from the template
    alone. The rendering before a message plus the generation prompt is the prompt; what the message
    adds, through the end mark, is the response.
    """

    @cached_property
    def response_lead(self) -> list[Segment]:
        text = self.lead_text
        return self.split([Piece(text[: len(text) - len(self.plain_lead())], None)], {})

    def plain_lead(self) -> str:
        """What of the text between prompt and content stands behind its last special token."""
        return self.special.split(self.lead_text)[-1]

    def strip_markers(self, text: str) -> str:
        return text.removeprefix(self.plain_lead())

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        """The whole conversation.

        Raises RewritesHistory where a trained response is written otherwise once turns follow it,
        BadRow where the template refuses the conversation, or leaves out or rewrites its text.
        """
        return self.segments(fold_context(messages), tools)

    def render_prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> list[Segment]:
        """The conversation and the template's generation prompt. Raises BadRow as `render`."""
        history: list[Message] = [{**turn, "is_trained": False} for turn in fold_context(messages)]
        return self.segments(history, tools, add_generation_prompt=True)

    def segments(
        self, messages: list[Message], tools: Sequence[Tool], add_generation_prompt: bool = False
    ) -> list[Segment]:
        self.check_places(messages, tools)
        messages = [self.with_thought_in_place(turn) for turn in messages]
        whole = self.rendering(messages, tools, add_generation_prompt)
        responses: dict[Span, bool] = {}  # is it trained
        for number, turn in enumerate(messages):
            if turn["role"] == "assistant":
                is_trained = turn.get("is_trained", True)
                try:
                    span = self.response_span(messages, tools, number, whole)
                except BadRow:
                    if is_trained:
                        raise
                    continue  # history is what the template makes of it
                responses[span] = is_trained
        check_written(messages, whole)
        return self.split(whole.pieces, responses)

    def check_places(self, messages: list[Message], tools: Sequence[Tool]) -> None:
        """Raises BadRow for tools and calls that the template does not write."""
        if tools and not self.has_tools:
            raise BadRow(f"the tokenizer's chat template has no place for tools; {ANOTHER}")
        self.check_spelling(tools)
        for number, turn in enumerate(messages):
            calls = turn.get("tool_calls", [])
            if calls and self.call_form is None:
                raise BadRow(
                    f"turn {number}: the tokenizer's chat template has no place for tool calls; "
                    f"{ANOTHER}"
                )
            self.check_spelling([call["function"]["arguments"] for call in calls])

    def check_spelling(self, values: Sequence[Any]) -> None:
        """Raises BadRow where tools or arguments spell a special token, which they would become."""
        text = json.dumps(values, ensure_ascii=False) if values else ""
        if found := (self.special.search(text) or re.search("\ue000", text)):
            raise BadRow(f"tools or arguments of a call spell the special token {found[0]!r}")

    def with_thought_in_place(self, turn: Message) -> Message:
        """The thought apart from the content, or at its beginning, as the template reads it.

        Where a prompt opens a thought, a response without one gets an empty one.
        """
        if turn["role"] != "assistant":
            return turn
        content, reasoning = turn["content"], turn.get("reasoning_content", "")
        found = None if reasoning else THOUGHT.match(content)
        if found and (self.has_reasoning or self.opens_thought):
            reasoning, content = found[1].strip("\n"), found[2].lstrip("\n")
        if self.opens_thought:
            content, reasoning = f"<think>\n{reasoning}\n</think>\n\n{content}", ""
        return {**turn, "content": content, "reasoning_content": reasoning}

    def rendering(
        self, messages: list[Message], tools: Sequence[Tool], add_generation_prompt: bool = False
    ) -> Rendering:
        """The rendered text, cut at the borders of each text of a message."""
        text = self.apply(messages, tools, add_generation_prompt)
        numbered, texts = with_numbers(messages)
        before, *parts = MARK.split(self.apply(numbered, tools, add_generation_prompt))
        pieces, written = [Piece(before, None)], set()
        seen: set[int] = set()
        at = len(before)
        for number, after in zip(map(int, parts[::2]), parts[1::2], strict=True):
            turn, what, value = texts[number]
            found = next((f for f in forms(value) if text.startswith(f + after, at)), value)
            pieces += [Piece(found, REPEATED if number in seen else turn), Piece(after, None)]
            seen.add(number)
            written.add((turn, what))
            at += len(found) + len(after)
        if "".join(piece.text for piece in pieces) != text:
            raise BadRow(
                "the tokenizer's chat template rewrites the content of a message; "
                f"{ANOTHER}{self.offer()}"
            )
        return Rendering(pieces, written, self.special_in(pieces))

    def special_in(self, pieces: list[Piece]) -> list[Span]:
        spans, at = [], 0
        for piece in pieces:
            if piece.turn is None:
                found = self.special.finditer(piece.text)
                spans += [(at + token.start(), at + token.end()) for token in found]
            at += len(piece.text)
        return spans

    def response_span(
        self, messages: list[Message], tools: Sequence[Tool], number: int, whole: Rendering
    ) -> Span:
        """Where in the whole text the response of message `number` starts and ends."""
        prompt = self.apply(messages[:number], tools, add_generation_prompt=True)
        until = self.apply(messages[: number + 1], tools)
        if not until.startswith(prompt):
            raise BadRow(
                f"turn {number}: the response does not begin where the prompt of generation ends, "
                f"{prompt[-24:]!r}; set what it asks for in data.chat_template_kwargs (such as "
                f"enable_thinking: true or false), or {ANOTHER}{self.offer()}"
            )
        text = whole.text
        end = whole.end_of(number, len(prompt))
        shared = shared_length(text, until)
        closed = self.end_of_response(whole, until, end, shared) if shared >= end else None
        if closed is None:
            raise RewritesHistory(
                f"turn {number}: the tokenizer's chat template rewrites earlier turns, so that the "
                "prompt of this response is not the beginning of the conversation; "
                f"data.turns: each makes one example of each response{self.offer()}"
            )
        return len(prompt), closed

    def end_of_response(self, whole: Rendering, until: str, end: int, shared: int) -> int | None:
        """Where the end marks end behind a response whose content ends at `end`.

        `until` is the text with this response as the last, and begins as the whole text does, for
        `shared` characters. A template may close the last turn with another token (gpt-oss), or
        with one more (Phi). None where more than that is different.
        """
        behind = [span for span in whole.special if span[0] >= end]
        inside = [stop for _, stop in behind if stop <= shared]
        if shared == len(until):
            return max([end, *inside])
        start, stop = next((span for span in behind if span[1] > shared), (shared, shared))
        border = min(shared, start)
        if self.special.sub("", until[border:]).strip() or whole.text[border:start].strip():
            return None
        is_next_turn = self.closing is not None and self.closing.is_next_turn
        return inside[-1] if inside and not is_next_turn else stop

    def offer(self) -> str:
        """What a refusal adds where trl has a form of the template that is made for training."""
        name = training_variant(self.tokenizer.get_chat_template())
        return f"; data.chat_template: {name} is trl's form of it for training" if name else ""

    def split(self, pieces: list[Piece], responses: dict[Span, bool]) -> list[Segment]:
        """Pieces cut at special tokens and at the borders of responses."""
        segments: list[Segment] = []
        borders = sorted({border for span in responses for border in span})
        at = 0
        for piece in pieces:
            is_template = piece.turn is None
            for part in self.special.split(piece.text) if is_template else [piece.text]:
                end = at + len(part)
                cuts = [at, *(border for border in borders if at < border < end), end]
                for start, stop in pairwise(cuts):
                    text = part[start - at : stop - at]
                    is_special = is_template and bool(self.special.fullmatch(text))
                    found = [on for (first, last), on in responses.items() if first <= start < last]
                    segments.append(Segment(text, bool(found), is_special, all(found)))
                at = end
        return [segment for segment in segments if segment.text]


def shared_length(text: str, other: str) -> int:
    """How many characters both begin with."""
    if text.startswith(other):
        return len(other)
    pairs = enumerate(zip(text, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(text), len(other)))


def check_written(messages: list[Message], whole: Rendering) -> None:
    """Raises BadRow where the template leaves out text of a message.

    Thoughts of earlier responses are left out by most templates that know them.
    """
    for number, turn in enumerate(messages):
        is_trained = turn["role"] == "assistant" and turn.get("is_trained", True)
        texts = {
            "content": turn["content"].strip(),
            "tool call": turn.get("tool_calls"),
            "reasoning": is_trained and turn.get("reasoning_content"),
        }
        for what, text in texts.items():
            if text and (number, what) not in whole.written:
                raise BadRow(
                    f"turn {number}: the tokenizer's chat template leaves out the {what} of the "
                    f"role {turn['role']}; {ANOTHER}"
                )
