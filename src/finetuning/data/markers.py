"""Plain markers around the content of each role."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Markers:
    """The text (before, after) the content of each role. A role without markers is refused."""

    user: tuple[str, str]
    generation_prompt: str
    """ends the prompt; the response follows"""
    response_prefix: str = ""
    """first characters of the response, before the assistant's content"""
    system: tuple[str, str] | None = None
    context: tuple[str, str] | None = None
    """without it the material is put below the question"""
    tool: tuple[str, str] | None = None
    turn_separator: str = "\n"
    """between the end mark of a response and the next turn"""
