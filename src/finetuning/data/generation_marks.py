"""`{% generation %}` around what is trained, in a chat template that somebody else wrote.

transformers reads the mask of a conversation (return_assistant_tokens_mask) from these marks, and
most chat templates have none. Where a response begins and ends cannot be read from a template's
source, but from what it renders, as chat_template.py does: the template becomes a macro, and what
it renders is written in parts.
"""

import re
from collections.abc import Sequence

from finetuning.data.jinja_source import literal

MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
BEFORE = "{%- macro generation_whole(messages, add_generation_prompt) %}\n"
# Of white space at its end nothing is lost: `+` is against lstrip_blocks.
BEHIND = "{%+ endmacro -%}"
# A response: from the end of its prompt through the end marks behind it. One whose prompt is not
# the beginning of the conversation has no marks, nor has one that ends otherwise once turns follow
# it (gpt-oss): the mark that it has as the last turn is that of a later one. The names are such as
# no template has: a macro sees them.
PARTS = """
{%- set generation_text = generation_whole(messages, add_generation_prompt) -%}
{%- set generation_at = namespace(written=0, asked=false) -%}
{%- for generation_turn in messages -%}
{%- if generation_turn.role == 'assistant' and generation_at.asked -%}
{%- set start = generation_whole(messages[:loop.index0], true) -%}
{%- set alone = generation_whole(messages[:loop.index], false) -%}
{%- set end = namespace(first=-1, last=-1) -%}
{%- for mark in ENDS -%}
{%- set found = generation_text.find(mark, start | length) -%}
{%- if 0 <= found < alone | length and (end.first < 0 or found < end.first) -%}
{%- set end.first = found -%}{%- set end.last = found + mark | length -%}
{%- endif -%}
{%- endfor -%}
{%- for mark in FOLLOWING -%}
{%- if end.last >= 0 and generation_text.startswith(mark, end.last) -%}
{%- set end.last = end.last + mark | length -%}
{%- endif -%}
{%- endfor -%}
{%- if end.last >= 0 and generation_text.startswith(start) -%}
{{- generation_text[generation_at.written:start | length] -}}
{%- generation -%}{{- generation_text[start | length:end.last] -}}{%- endgeneration -%}
{%- set generation_at.written = end.last -%}
{%- endif -%}
{%- endif -%}
{%- if generation_turn.role == 'user' -%}{%- set generation_at.asked = true -%}{%- endif -%}
{%- endfor -%}
{{- generation_text[generation_at.written:] -}}
""".replace("\n", "")
BETWEEN = BEHIND + PARTS.partition("ENDS")[0]


def with_generation_marks(template: str, ends: Sequence[str], following: Sequence[str]) -> str:
    """The template, which writes the same, with marks around each response of an assistant.

    A response ends behind the first of the `ends` in it, and those of `following` behind that.
    """
    # Its own marks may leave out the end mark; inside a macro they would mark other characters.
    unmarked = MARK.sub(lambda mark: block(*mark.groups("")), template)
    listed = [f"[{', '.join(map(literal, marks))}]" for marks in (ends, following)]
    parts = PARTS.replace("ENDS", listed[0], 1).replace("FOLLOWING", listed[1], 1)
    # Jinja drops the line feed at the end of a template.
    return f"{BEFORE}{unmarked.removesuffix(chr(10))}{BEHIND}{parts}"


def block(left: str, end: str, right: str) -> str:
    """A block that does nothing, with the mark's control of white space."""
    return f"{{%{left} {'endif' if end else 'if true'} {right}%}}"


def without_generation_marks(template: str) -> str:
    """The template that was given to with_generation_marks; another one as it is."""
    inner, _, rest = template.removeprefix(BEFORE).rpartition(BETWEEN)
    return inner if template.startswith(BEFORE) and rest else template
