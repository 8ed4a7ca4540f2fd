"""A conversation remembers what was said, and nothing that goes wrong in a turn ends it."""

import pytest

from finetuning.errors import UserError
from finetuning.inference.conversation import converse


class Listener:
    """Answers with what it was asked, and how many turns came before."""

    def stream(self, messages, show):
        words = messages[-1]["content"]
        if words == "too long":
            raise UserError("a question has 300 tokens")
        show("partly ")
        if words == "stop":
            raise KeyboardInterrupt
        heard = [f"{m['role'][0]}:{m['content']}" for m in messages]
        show(" | ".join(heard))
        return f"re {words}"


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function that types lines, then ends the input; what was printed."""

    def talk(*lines: str, remembers: bool = True) -> tuple[list[str], str]:
        typed = iter(lines)

        def read(prompt: str) -> str:
            for line in typed:
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", read)
        converse(Listener(), remembers)
        printed = capsys.readouterr()
        return [line.removeprefix("partly ") for line in printed.out.splitlines()], printed.err

    return talk


def test_what_was_said_is_remembered_until_a_new_conversation(talk):
    said, _ = talk("Hi", "", "Bye", "/new", "Hi", "/quit", "never asked")
    assert said == ["u:Hi", "u:Hi | a:re Hi | u:Bye", "u:Hi"]


def test_instructions_come_first_and_begin_another_conversation(talk):
    said, _ = talk("Hi", "/system Be brief.", "Hi", "/system", "Hi")
    assert said == ["u:Hi", "s:Be brief. | u:Hi", "u:Hi"]


def test_lines_can_be_asked_alone(talk):
    assert talk("Hi", "Bye", remembers=False)[0] == ["u:Hi", "u:Bye"]


def test_a_turn_that_is_too_long_or_interrupted_was_never_said(talk):
    said, told = talk("Hi", "too long", "stop", "Bye")
    assert said == ["u:Hi", "", "u:Hi | a:re Hi | u:Bye"]
    assert "not answered: a question has 300 tokens" in told
    assert "not answered: interrupted" in told


def test_a_command_that_does_not_exist_is_no_question(talk):
    said, told = talk("/sytem Be brief.")
    assert said == [] and "unknown: /sytem" in told and "/system TEXT" in told
