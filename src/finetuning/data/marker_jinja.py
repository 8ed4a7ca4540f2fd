"""A marker template as Jinja: what `render` and `render_prompt` do, in another language.

`{% generation %}` stands around what is trained, so that transformers gives the same mask.
"""

from dataclasses import dataclass

from finetuning.data.context_turns import BELOW
from finetuning.data.jinja_source import literal
from finetuning.data.markers import Markers

REFUSED = "{{- raise_exception('the template has no place for the role ' ~ role) -}}"


@dataclass(frozen=True)
class MarkerJinja:
    """The Jinja of a marker template, put together from its parts.

    A case is the condition of an `if`, and what is written of a turn of that role.
    """

    markers: Markers
    eos: str
    bos: str | None
    newline: str | None

    @property
    def text(self) -> str:
        cases = "{%- elif ".join([self.response, self.user, *self.others])
        bos = f"{{{{- {literal(self.bos)} -}}}}" if self.bos else ""
        prompt = self.write(self.markers.generation_prompt)
        return (
            f"{{%- set turns = namespace(ended=false, last='') -%}}{bos}"
            f"{{%- for message in messages -%}}{{%- set role = message.role -%}}{self.separator}"
            f"{{%- if {cases}{{%- else -%}}{REFUSED}{{%- endif -%}}"
            "{%- set turns.ended = role == 'assistant' -%}{%- set turns.last = role -%}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{self.separator}{prompt}{{%- endif -%}}"
        )

    @property
    def separator(self) -> str:
        """Between the end mark of a response and the next turn."""
        between = self.write(self.markers.turn_separator)
        return f"{{%- if turns.ended -%}}{between}{{%- endif -%}}"

    @property
    def response(self) -> str:
        markers = self.markers
        return (
            f"role == 'assistant' -%}}{self.write(markers.generation_prompt)}{{%- generation -%}}"
            f"{self.write(markers.response_prefix)}{self.content}"
            f"{{{{- {literal(self.eos)} -}}}}{{%- endgeneration -%}}"
        )

    @property
    def user(self) -> str:
        """Where there is no place for material, it goes below the question, as in fold_context."""
        markers = self.markers
        if markers.context is not None:
            return self.turn("user", markers.user)
        before, after = map(self.write, markers.user)
        return (
            "role in ('user', 'context') -%}"
            "{%- if role == 'context' and turns.last in ('user', 'context') -%}"
            f"{self.write(BELOW)}{{%- else -%}}{before}{{%- endif -%}}{self.content}"
            f"{{%- if loop.last or loop.nextitem.role != 'context' -%}}{after}{{%- endif -%}}"
        )

    @property
    def others(self) -> list[str]:
        markers = self.markers
        places = {"system": markers.system, "context": markers.context, "tool": markers.tool}
        return [self.turn(role, around) for role, around in places.items() if around is not None]

    def turn(self, role: str, around: tuple[str, str]) -> str:
        before, after = map(self.write, around)
        return f"role == {literal(role)} -%}}{before}{self.content}{after}"

    @property
    def content(self) -> str:
        replaced = f" | replace('\\n', {literal(self.newline)})" if self.newline else ""
        return f"{{{{- message.content{replaced} -}}}}"

    def write(self, text: str) -> str:
        written = text.replace("\n", self.newline) if self.newline else text
        return f"{{{{- {literal(written)} -}}}}"
