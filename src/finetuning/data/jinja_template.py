"""A tokenizer's chat template: the Jinja that is trained with and saved, and what it can write.

What a template has a place for is not declared anywhere: it is found by asking it.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from finetuning.data.generation_marks import with_generation_marks, without_generation_marks
from finetuning.data.message_forms import (
    CALLS,
    PLACEHOLDER,
    QUESTION,
    TOOLS,
    CallForm,
    calling,
    in_form,
)
from finetuning.data.row import BadRow, Message, Tool, message
from finetuning.data.template_source import (
    with_content_in_parts,
    with_fixed_date,
    with_mark_at_end,
    with_mark_in_content,
    without_mark_at_end,
)
from finetuning.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPEN_THOUGHT = re.compile(r"<think>\s*$")


class Closing(NamedTuple):
    """What ends a response of a chat template."""

    marks: list[tuple[str, str]]
    """(text, special token) one after another, behind the content of a response"""
    is_next_turn: bool = False
    """the mark belongs to the turn that follows (GLM), so that there is none behind the last"""


class JinjaTemplate:
    """The chat template of a tokenizer as other programs apply it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer

    def apply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        """The rendered text. Raises BadRow with whatever the template raises."""
        if not messages:
            raise BadRow("the tokenizer's chat template needs a message before the first response")
        has_calls = any(turn.get("tool_calls") for turn in messages)
        form = self.call_form if has_calls else None
        turns = [in_form(turn, form) for turn in messages]
        return self.apply_to(turns, tools, add_generation_prompt, template or self.unmarked)

    def apply_to(
        self,
        turns: list[dict[str, Any]],
        tools: Sequence[Tool],
        add_generation_prompt: bool,
        template: str,
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=list(tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            reason = one_line(error) or type(error).__name__
            raise BadRow(
                f"the tokenizer's chat template refuses the conversation: {reason}"
            ) from None
        return cast("str", text)

    def probe(
        self,
        messages: list[Message],
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = False,
        template: str | None = None,
        form: CallForm | None = None,
    ) -> str:
        """The rendered text; empty where the template refuses the conversation."""
        turns = [in_form(turn, form) for turn in messages]
        try:
            return self.apply_to(turns, tools, add_generation_prompt, template or self.unmarked)
        except BadRow:
            return ""

    def check(self) -> None:
        """Raises BadRow where the template cannot write a question and its answer."""
        self.apply([QUESTION, message("assistant", "b")])

    @cached_property
    def special(self) -> re.Pattern[str]:
        """The tokenizer's added tokens in template text."""
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        by_length = sorted(tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, by_length))})" if tokens else r"(?!)")

    # The template itself

    @cached_property
    def dated(self) -> str:
        """The tokenizer's chat template, in which strftime_now is a macro that returns TODAY."""
        saved = without_generation_marks(self.tokenizer.get_chat_template())
        return with_fixed_date(without_mark_at_end(saved))

    @cached_property
    def textual(self) -> str:
        """The same for content that is text: some (SmolVLM's) write only content in parts."""
        question = [message("user", PLACEHOLDER)]
        in_parts = with_content_in_parts(self.dated)
        is_written, is_written_in_parts = (
            PLACEHOLDER in self.probe(question, template=template)
            for template in (self.dated, in_parts)
        )
        return in_parts if is_written_in_parts and not is_written else self.dated

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
            return with_mark_in_content(self.textual, self.tokenizer.eos_token)
        if self.closing.is_next_turn:
            ((gap, mark),) = self.closing.marks
            return with_mark_at_end(self.textual, gap + mark)
        return self.textual

    # What ends a response

    @cached_property
    def closing(self) -> Closing | None:
        """What ends a response in the tokenizer's template; None if nothing does."""
        if marks := self.leading_marks(self.tail([]), r"[\s\S]*?"):
            return Closing(marks)
        marks = self.leading_marks(self.tail([message("user", PLACEHOLDER)]), r"\s*")
        return Closing(marks[:1], is_next_turn=True) if marks else None

    def tail(self, following: list[Message]) -> str:
        """The template's text behind a response, up to the content of what follows."""
        turns = [QUESTION, message("assistant", PLACEHOLDER), *following]
        return self.probe(turns, template=self.textual).partition(PLACEHOLDER)[2]

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
    def end_marks(self) -> list[str]:
        eos = self.tokenizer.eos_token
        marks = [mark for _, mark in self.closing.marks] if self.closing else []
        if self.closing and self.closing.is_next_turn:
            tail = self.tail([message("tool", PLACEHOLDER)])
            marks += [mark for _, mark in self.leading_marks(tail, r"\s*")[:1]]
        return list(dict.fromkeys([*marks, *self.marks_of_calls, *([eos] if eos else [])]))

    @cached_property
    def marks_of_calls(self) -> list[str]:
        """The special token behind a tool call: gpt-oss has one of its own, <|call|>."""
        if self.call_form is None or self.closing is None or self.closing.is_next_turn:
            return []
        text = self.probe([QUESTION, calling()], TOOLS, form=self.call_form)
        return self.special.findall(text.rpartition(PLACEHOLDER)[2])[-1:]

    @property
    def added_end_mark(self) -> str | None:
        if self.closing is None:
            eos: str | None = self.tokenizer.eos_token
            return eos
        return self.closing.marks[0][1] if self.closing.is_next_turn else None

    # What it has a place for

    @cached_property
    def lead_text(self) -> str:
        """What it writes between the prompt and the content of a response."""
        prompt = self.probe([QUESTION], add_generation_prompt=True)
        text = self.probe([QUESTION, message("assistant", PLACEHOLDER)])
        return text.partition(PLACEHOLDER)[0][len(prompt) :] if text.startswith(prompt) else ""

    @cached_property
    def has_tools(self) -> bool:
        return PLACEHOLDER in self.probe([QUESTION], TOOLS)

    @cached_property
    def call_form(self) -> CallForm | None:
        """How it wants tool calls; None where it writes none."""
        for form in (CallForm(*each) for each in product(("", None), (False, True))):
            if PLACEHOLDER in self.probe([QUESTION, calling()], template=self.textual, form=form):
                return form
        return None

    @cached_property
    def has_reasoning(self) -> bool:
        """Whether it has a place for `reasoning_content`, beside content or beside a call."""
        thought: Any = {"reasoning_content": PLACEHOLDER}
        calls: Any = [{**CALLS[0], "function": {"name": "f", "arguments": {}}}]
        beside_content: Any = {**message("assistant", "a"), **thought}
        beside_call: Any = {**calling(), **thought, "tool_calls": calls}
        forms = ((beside_content, None), (beside_call, self.call_form))
        return any(PLACEHOLDER in self.probe([QUESTION, turn], form=form) for turn, form in forms)

    @cached_property
    def opens_thought(self) -> bool:
        """Whether its prompt opens a thought although it has no place for one (DeepSeek R1)."""
        prompt = self.probe([QUESTION], add_generation_prompt=True)
        return bool(OPEN_THOUGHT.search(prompt)) and not self.has_reasoning
