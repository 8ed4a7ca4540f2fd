"""A JSON text of any size, read value by value.

json.loads wants the whole text at once. ijson does not, but is another parser: it makes a question
mark of half a character (`\\ud800`) and refuses NaN and large numbers. Here each value is parsed by
the standard library's decoder, as soon as enough of the text is there.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 2**20  # bytes that are read at once
BEHIND_VALUE = frozenset(" \t\n\r,:]}")  # a number before anything else may go on
NOT_BLANK = re.compile(r"[^ \t\n\r]")
DECODER = json.JSONDecoder()


class JsonText:
    """Raises JSONDecodeError, UnicodeDecodeError and RecursionError as json.loads does."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0  # what was read and not dropped, and the next place in it
        self.bytes_read = self.lines_dropped = 0
        self.is_whole = False

    def elements(self) -> Iterator[Any]:
        """The values of an array, which comes next."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """The keys of an object, which comes next; the value of each is taken before the next."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self.error("Expecting property name enclosed in double quotes")
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def value(self) -> Any:
        """The value that comes next, of any kind."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.is_whole:
                    raise self.error(error.msg, error.pos) from None
            else:
                if self.is_whole or self.text[end : end + 1] in BEHIND_VALUE:
                    self.at = end
                    return value
            self.read_more(size)
            size *= 2  # or a value of many chunks would be parsed as often as it has chunks

    def take(self, expected: str) -> str:
        """The next character, which is one of these."""
        found = self.peek()
        if not found or found not in expected:
            wanted = " or ".join(map(repr, expected))
            raise self.error(f"Expecting {wanted} delimiter")
        self.at += 1
        return found

    def end(self) -> None:
        """Raises JSONDecodeError where anything comes behind the value."""
        if self.peek():
            raise self.error("Extra data")

    def peek(self) -> str:
        """The next character that is not blank; nothing at the end."""
        while True:
            found = NOT_BLANK.search(self.text, self.at)
            self.at = found.start() if found else len(self.text)
            if found or self.is_whole:
                return found[0] if found else ""
            self.read_more(CHUNK)

    def read_more(self, size: int) -> None:
        """Drops what was taken, and reads so many bytes more."""
        self.lines_dropped += self.text.count("\n", 0, self.at)
        content = self.stream.read(size)
        self.is_whole = not content
        self.text, self.at = self.text[self.at :] + self.decoded(content), 0

    def decoded(self, content: bytes) -> str:
        """The next bytes as text, without the byte order mark of the file's beginning."""
        left_over = len(self.decoder.getstate()[0])  # bytes of a character that was not whole
        before = self.bytes_read - left_over
        try:
            text = self.decoder.decode(content, final=self.is_whole)
        except UnicodeDecodeError as error:
            places = before + error.start, before + error.end
            raise UnicodeDecodeError("utf-8", content, *places, error.reason) from None
        self.bytes_read += len(content)
        return text if before else text.removeprefix("\ufeff")

    def error(self, message: str, at: int | None = None) -> json.JSONDecodeError:
        """The error at a place of the text, with its line in the file."""
        place = self.at if at is None else at
        lines = "\n" * self.lines_dropped
        return json.JSONDecodeError(message, lines + self.text, len(lines) + place)
