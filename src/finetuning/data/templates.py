"""Messages -> segments: which text stands around each message, and which text the model must produce.

    messages   user "Hi"                assistant "Hello!"
    segments   "### Question: Hi\\n### Answer:" prompt | " Hello!" response | "<eos>" response, a special token

Training text and the prompt of generation come from the same template, so they cannot drift apart. To add a template of
plain markers, add one entry to TEMPLATES. `chat` is the tokenizer's own chat template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from finetuning.data.row import BadRow, Message


class Segment(NamedTuple):
    """A piece of text. Only a special one may become a special token: row text that spells one stays ordinary text."""

    text: str
    is_response: bool = False
    is_special: bool = False


@dataclass(frozen=True)
class Markers:
    """The text before and after each role's words. A role without markers is refused."""

    user: tuple[str, str]
    generation_prompt: str
    """ends the prompt; the response follows"""
    response_prefix: str = ""
    """first characters of the response, before the assistant's words"""
    system: tuple[str, str] | None = None
    context: tuple[str, str] | None = None
    """without it the material is put below the question"""
    tool: tuple[str, str] | None = None
    turn_separator: str = "\n"
    """from one response's end mark to the next turn"""


TEMPLATES: dict[str, Markers | None] = {
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
    "chat": None,  # ChatTemplate
}


class MarkerTemplate:
    """Plain markers around each role's words, the end-of-text token after every response."""

    def __init__(
        self, markers: Markers, eos: str, bos: str | None = None, newline: str | None = None
    ) -> None:
        self.markers, self.eos, self.bos, self.newline = markers, eos, bos, newline

    @property
    def end_marks(self) -> list[str]:
        """The special tokens that end a response."""
        return [self.eos]

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The whole conversation. Raises BadRow on a role the template has no place for."""
        segments = [Segment(self.bos, is_special=True)] if self.bos else []
        for number, message in enumerate(
            fold_context(messages) if self.markers.context is None else messages
        ):
            if number and segments[-1].is_response:
                segments.append(self.plain(self.markers.turn_separator))
            segments += self.turn(message, number)
        return segments

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation up to where the next response starts."""
        return self.render([*messages, {"role": "assistant", "content": ""}])[:-2]

    def answer(self, text: str) -> str:
        """The assistant's words in a generated response."""
        text = text.removeprefix(self.markers.response_prefix)
        return text.replace(self.newline, "\n") if self.newline else text

    def turn(self, message: Message, number: int) -> list[Segment]:
        role, words = message["role"], message["content"]
        if role == "assistant":
            response = self.plain(self.markers.response_prefix + words, is_response=True)
            return [
                self.plain(self.markers.generation_prompt),
                response,
                Segment(self.eos, is_response=True, is_special=True),
            ]
        around = getattr(self.markers, role)
        if around is None:
            raise BadRow(f"turn {number}: the template has no place for the role {role}")
        return [self.plain(around[0] + words + around[1])]

    def plain(self, text: str, is_response: bool = False) -> Segment:
        return Segment(text.replace("\n", self.newline) if self.newline else text, is_response)


def fold_context(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with material put below the question it belongs to."""
    folded: list[Message] = []
    for message in messages:
        if message["role"] == "context" and folded and folded[-1]["role"] == "user":
            folded[-1] = {
                "role": "user",
                "content": f"{folded[-1]['content']}\n\n{message['content']}",
            }
        else:
            folded.append(
                {"role": "user", "content": message["content"]}
                if message["role"] == "context"
                else message
            )
    return folded
