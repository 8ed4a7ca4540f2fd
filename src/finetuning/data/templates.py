"""Messages -> segments: the text around each message, and which text the model must produce.

    messages   user "Hi"                assistant "Hello!"
    segments   "### Question: Hi\\n### Answer:" | " Hello!" response | "<eos>" response, special

Training text and the prompt of generation come from the same template, so they cannot differ. To
add a template of plain markers, add one entry to TEMPLATES. `chat` is the tokenizer's own chat
template (chat_template.py).

An end mark is the token that ends a response: the tokenizer's EOS token, or the end-of-turn token
of a chat template, such as <|im_end|>. It is trained with the response, and generation stops at it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from finetuning.data.context_turns import fold_context
from finetuning.data.marker_jinja import MarkerJinja
from finetuning.data.markers import Markers
from finetuning.data.row import BadRow, Message, Tool, message


class Segment(NamedTuple):
    """A piece of text. Only a special one may become a special token; row text never does."""

    text: str
    is_response: bool = False
    is_special: bool = False
    is_trained: bool = True
    """False for a response that is read, but not trained"""


class Template(Protocol):
    """How a conversation is written as text, for training and for generation."""

    @property
    def end_marks(self) -> list[str]:
        """The special tokens that end a response."""

    @property
    def added_end_mark(self) -> str | None:
        """The end mark that is put behind responses because a chat template has none there."""

    @property
    def response_lead(self) -> list[Segment]:
        """Special tokens, and text between them, from the end of a prompt to the content."""

    @property
    def jinja(self) -> str:
        """The same as a chat template of transformers, which the saved tokenizer brings along."""

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        """The whole conversation. Raises BadRow where the template cannot write it."""

    def render_prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> list[Segment]:
        """The conversation up to where the next response starts. Raises BadRow as `render`."""

    def strip_markers(self, text: str) -> str:
        """The assistant's content in the text of a generated response."""


NO_PLACE = "the template has no place"
CHAT = "chat"  # data.template of the tokenizer's own chat template
TEXT = "text"  # data.reader and data.template of text that answers nothing
TEMPLATES: dict[str, Markers] = {
    "question_answer": Markers(
        system=("", "\n"),
        user=("### Question: ", "\n"),
        context=("### Context: ", "\n"),
        tool=("### Result: ", "\n"),
        generation_prompt="### Answer:",
        response_prefix=" ",
    ),
    # The Japanese Alpaca form, see https://github.com/masa3141/japanese-alpaca-lora
    "instruction_ja": Markers(
        system=("", "\n\n"),
        user=("### 指示:\n", "\n\n"),
        context=("### 入力:\n", "\n\n"),
        tool=("### 結果:\n", "\n\n"),
        generation_prompt="### 回答:\n",
    ),
    "plain_chat": Markers(
        system=("System: ", "\n"),
        user=("User: ", "\n"),
        tool=("Tool: ", "\n"),
        generation_prompt="Assistant:",
        response_prefix=" ",
    ),
    TEXT: Markers(user=("", ""), generation_prompt=""),
}


@dataclass(frozen=True)
class MarkerTemplate:
    """Plain markers around the content of each role, the EOS token after every response."""

    markers: Markers
    eos: str
    bos: str | None = None
    newline: str | None = None
    """written instead of every line feed"""

    @property
    def end_marks(self) -> list[str]:
        return [self.eos]

    @property
    def added_end_mark(self) -> str | None:
        return None

    @property
    def response_lead(self) -> list[Segment]:
        return []

    @property
    def jinja(self) -> str:
        return MarkerJinja(self.markers, self.eos, self.bos, self.newline).text

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Segment]:
        if tools:
            raise BadRow(f"{NO_PLACE} for tools; template: chat may have one")
        if self.markers.context is None:
            messages = fold_context(messages)
        segments = [Segment(self.bos, is_special=True)] if self.bos else []
        for number, turn in enumerate(messages):
            if number and segments[-1].is_response:
                segments.append(self.plain(self.markers.turn_separator))
            segments += self.render_turn(turn, number)
        return segments

    def render_prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> list[Segment]:
        *prompt, _response, _eos = self.render([*messages, message("assistant", "")], tools)
        return prompt

    def strip_markers(self, text: str) -> str:
        text = text.removeprefix(self.markers.response_prefix)
        return text.replace(self.newline, "\n") if self.newline else text

    def render_turn(self, turn: Message, number: int) -> list[Segment]:
        role, content = turn["role"], turn["content"]
        for part in ("reasoning_content", "tool_calls"):
            if turn.get(part):
                raise BadRow(f"turn {number}: {NO_PLACE} for {part}; template: chat may have one")
        if role == "assistant":
            is_trained = turn.get("is_trained", True)
            response = self.plain(self.markers.response_prefix + content)
            return [
                self.plain(self.markers.generation_prompt),
                response._replace(is_response=True, is_trained=is_trained),
                Segment(self.eos, True, True, is_trained),
            ]
        around: tuple[str, str] | None = getattr(self.markers, role)
        if around is None:
            raise BadRow(f"turn {number}: {NO_PLACE} for the role {role}")
        before, after = around
        return [self.plain(before + content + after)]

    def plain(self, text: str) -> Segment:
        return Segment(text.replace("\n", self.newline) if self.newline else text)
