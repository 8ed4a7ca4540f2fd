"""A conversation at a terminal: what was said is remembered, answers appear word by word."""

import sys
from contextlib import suppress

from finetuning.data.row import Message, message
from finetuning.errors import UserError, one_line
from finetuning.inference.generation import Asker
from finetuning.untrusted_text import printable

MANUAL = "/new begins another conversation, /system TEXT one with instructions, /quit ends"


class Chat:
    """What was said so far."""

    def __init__(self, asker: Asker, remembers: bool = True) -> None:
        self.asker, self.remembers = asker, remembers
        self.messages: list[Message] = []

    def begin(self, system: str = "") -> None:
        self.messages = [message("system", system)] if system else []

    def say(self, text: str) -> None:
        """Prints the answer. Without one (the turn is too long, Ctrl-C) nothing was said."""
        asked = [*self.messages, message("user", text)]
        try:
            answer = self.asker.stream(asked, show)
        except UserError as error:
            print(f"not answered: {one_line(error)}; {MANUAL}", file=sys.stderr)
        except KeyboardInterrupt:
            print()
            print("not answered: interrupted", file=sys.stderr)
        else:
            print()
            if self.remembers:
                self.messages = [*asked, message("assistant", answer)]


def show(piece: str) -> None:
    print(printable(piece), end="", flush=True)


def converse(asker: Asker, remembers: bool) -> None:
    """Until /quit or the end of input. Unless it remembers, each line is asked alone."""
    with suppress(ImportError):  # for editing lines, where Python has it
        import readline  # noqa: F401
    chat = Chat(asker, remembers)
    print(MANUAL, file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            chat.begin()
        elif command == "/system":
            chat.begin(rest.strip())
        elif command.startswith("/"):
            print(f"unknown: {command}; {MANUAL}", file=sys.stderr)
        elif line:
            chat.say(line)
