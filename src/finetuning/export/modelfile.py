"""An Ollama Modelfile: chat template in Ollama's language, end tokens, settings, licence."""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from finetuning.data.row import Message
from finetuning.recipe.sections import Generation

Render = Callable[[Sequence[Message]], str]
"""messages -> the prompt for the next response; ValueError for roles it has no place for"""
# Content of messages that no template spells.
SYSTEM, FIRST, RESPONSE, SECOND = (f"\ue000{letter}\ue000" for letter in "suav")
# What is sent in a chat and no template leaves as it is by chance.
CONTENT = " One.\n\nTwo "


class Turns(NamedTuple):
    """What stands around the content of each role."""

    begin: str
    system: tuple[str, str] | None
    user: str
    """before a question"""
    prompt: str
    """from a question to where the response starts"""
    history: str
    """from a question to the content of a response that is there already"""
    end: str
    """behind a response that is there already"""

    def text(self, messages: Sequence[Message]) -> str:
        """The prompt, as Ollama makes it from `template`."""
        parts, is_open = [self.begin], ""
        for message in messages:
            if message["role"] == "system":
                before, after = self.system or ("", "")
                parts += [before, message["content"], after]
            elif message["role"] == "user":
                parts += [is_open, self.user, message["content"]]
                is_open = self.prompt
            else:
                parts += [self.history, message["content"], self.end]
                is_open = ""
        return "".join([*parts, self.prompt])

    @property
    def template(self) -> str:
        """In Go's text/template, as Ollama reads it."""
        roles = [
            ("user", f"{self.user}{{{{ .Content }}}}"),
            ("assistant", f"{self.history}{{{{ .Content }}}}{self.end}"),
        ]
        if self.system:
            before, after = self.system
            roles.insert(0, ("system", f"{before}{{{{ .Content }}}}{after}"))
        cases = "".join(
            f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{text}'
            for number, (role, text) in enumerate(roles)
        )
        return (
            f"{self.begin}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{self.prompt}"
        )


def turns_of(render: Render) -> Turns | None:
    """The turns of a chat template; None for one that says more than what stands around content.

    Found by rendering conversations of marked content, and held against others.
    """
    try:
        alone = render([user(FIRST)])
        again = render([user(FIRST), assistant(RESPONSE), user(SECOND)])
        before, prompt = alone.split(FIRST)
        history = again.split(FIRST)[1].split(RESPONSE)[0]
        between = again.split(RESPONSE)[1].split(SECOND)[0]
    except (ValueError, IndexError):
        return None
    opening = common_end(before, between)
    begin = before.removesuffix(opening)
    around = system_of(render, begin, opening)
    turns = Turns(begin, around, opening, prompt, history, between.removesuffix(opening))
    conversation = [user(CONTENT), assistant("Yes."), user("And?"), assistant("No."), user(CONTENT)]
    asked = [conversation, *([[system(CONTENT), *conversation]] if around else [])]
    try:
        is_same = all(turns.text(messages) == render(messages) for messages in asked)
    except ValueError:
        return None
    spelt = "".join(text for part in turns for text in (part or ""))
    return turns if is_same and not any(mark in spelt for mark in ("{{", "}}", '"""')) else None


def system_of(render: Render, begin: str, opening: str) -> tuple[str, str] | None:
    """What stands around a system message; None where there is no place for one."""
    try:
        before, rest = render([system(SYSTEM), user(FIRST)]).split(SYSTEM)
        after = rest.split(FIRST)[0]
    except ValueError:
        return None
    if not before.startswith(begin) or not after.endswith(opening):
        return None
    return before.removeprefix(begin), after.removesuffix(opening)


def common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def modelfile(
    file: str, turns: Turns | None, ends: list[str], generation: Generation, license: str | None
) -> str:
    """The text of a Modelfile beside a GGUF file of that name."""
    lines = [f"FROM ./{file}"]
    if turns:
        lines.append(f'TEMPLATE """{turns.template}"""')
    else:
        lines.append("# No TEMPLATE: this chat template cannot be said in Ollama's language.")
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters(generation)]
    if license:
        text = license.replace('"""', "'''")  # it would end the licence, and begin an instruction
        lines.append(f'LICENSE """{text}"""')
    return "\n".join(lines) + "\n"


def parameters(generation: Generation) -> list[tuple[str, object]]:
    """The recipe's generation settings by Ollama's names; greedy unless it samples."""
    given = generation.model_dump(exclude_unset=True)
    found: list[tuple[str, object]] = [("num_predict", generation.max_new_tokens)]
    if not given.get("do_sample"):
        found.append(("temperature", 0))
    elif given.get("temperature") is not None:
        found.append(("temperature", given["temperature"]))
    if given.get("repetition_penalty") is not None:
        found += [("repeat_penalty", given["repetition_penalty"]), ("repeat_last_n", -1)]
    names = ("top_k", "top_p", "min_p")
    return found + [(name, given[name]) for name in names if given.get(name) is not None]
