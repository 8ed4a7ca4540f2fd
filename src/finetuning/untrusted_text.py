"""Text that is not ours: rows, names, answers of a Hub or a model, as it may be shown or written.

A terminal acts on control characters: they set its title and clipboard, and hide or colour text.
GitHub's CLI had to learn the same (cli/cli#6916). Markdown acts on a handful of others.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Control characters but tab and line feed; what reorders text (Trojan Source) or hides in it; line
# separators that are not line feeds; surrogates, which cannot be printed at all.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)

# What opens emphasis, code, a link, an image, a table cell, HTML or an entity in Markdown, and what
# GitHub makes links of without being asked.
MARKUP = re.compile(r"[\\`*\[\]<>|#~&$]|(?<!\w)_|_(?!\w)|(?<=[a-z]):(?=//)|(?<=www)\.|@", re.I)

MAX_CELL = 80  # characters

# Of an adapter's modules: groups are only alternatives, few repetitions. `(a+)+$` takes for ever.
MODEST_PATTERN = re.compile(
    r"(?=.{1,200}$)(?!(?:.*[*+{]){5})(?!.*\)[*+{])[\w.\-|()\\^$*+?:\[\]]*", re.ASCII
)
PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
PATTERN_KEYS = ("rank_pattern", "alpha_pattern")
TOO_SLOW = (
    "which could take for ever to match; a list of names is taken, and patterns without nested "
    "repetition"
)


def slow_patterns(lora: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, pattern) of the regular expressions of a LoraConfig that could take for ever."""
    for field in (*PATTERNS, *PATTERN_KEYS):
        value = lora.get(field)
        for pattern in (value,) if isinstance(value, str) else value or ():
            is_plain_name = isinstance(value, list)  # peft compares them
            if isinstance(pattern, str) and not is_plain_name and not is_modest(pattern):
                yield field, pattern


def is_modest(pattern: str) -> bool:
    return MODEST_PATTERN.fullmatch(pattern) is not None


def printable(text: str) -> str:
    r"""The text with every unprintable character as its escape: ESC becomes `\x1b`."""
    return UNPRINTABLE.sub(escape, text)


def escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def short_line(text: str) -> str:
    """Printable and on one line, at most 80 characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= MAX_CELL else f"{line[: MAX_CELL - 3]}..."


def inline(text: str) -> str:
    """The text as one line of Markdown in which nothing is markup: for a heading or a sentence."""
    return MARKUP.sub(r"\\\g<0>", printable(" ".join(text.split())))


def cell(text: str) -> str:
    """The same, at most 80 characters of it: for the cell of a table."""
    return MARKUP.sub(r"\\\g<0>", short_line(text))


def code_cell(text: str) -> str:
    """The text as Markdown code, for a table cell.

    A backtick would end the code, a bar the cell, and a comment could be taken for a marker.
    """
    for found, instead in (("`", "'"), ("|", "\\|"), ("<!--", "<! --")):
        text = text.replace(found, instead)
    return f"`{short_line(text)}`"
