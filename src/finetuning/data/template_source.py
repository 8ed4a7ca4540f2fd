"""Changes of a chat template's source, so that it writes what it left out."""

import re
from datetime import datetime

from finetuning.data.jinja_source import literal

# The date that a chat template gets when it asks for one: with the current date the same rows would
# have other ids tomorrow. Llama 3's templates write this one where no date can be asked for.
TODAY = datetime(2024, 7, 26)
DATE_PARTS = [f"%{letter}" for letter in ("-d", "-m", *"aAbBdeFHIjmMpSTyY")]
IS_CLOSED = "messages and messages[-1].role == 'assistant' and not add_generation_prompt"

MARK_AT_END = re.compile(rf"\{{\{{ \".*\" if {re.escape(IS_CLOSED)} else '' }}}}$")


def with_mark_at_end(template: str, mark: str) -> str:
    """The chat template with an end mark behind the last response of a conversation."""
    # Jinja drops the line feed at the end of a template.
    return f"{template.removesuffix(chr(10))}{{{{ {literal(mark)} if {IS_CLOSED} else '' }}}}"


def with_mark_in_content(template: str, mark: str) -> str:
    """The chat template with an end mark behind the content of every response."""
    content = f"message.content ~ {literal(mark)}"
    return with_other_content(template, "message.role == 'assistant'", content)


def with_content_in_parts(template: str) -> str:
    """The chat template for content that is text where it knows only parts of a content."""
    return with_other_content(
        template, "message.content is string", "[{'type': 'text', 'text': message.content}]"
    )


def with_other_content(template: str, condition: str, content: str) -> str:
    """The chat template with another content of the messages for which the condition holds."""
    return (
        "{% set changed = namespace(messages=[]) %}{% for message in messages %}"
        f"{{% if {condition} %}}"
        f"{{% set other = dict(message, content={content}) %}}"
        "{% set changed.messages = changed.messages + [other] %}"
        "{% else %}{% set changed.messages = changed.messages + [message] %}{% endif %}{% endfor %}"
        f"{{% set messages = changed.messages %}}\n{template}"
    )


def with_fixed_date(template: str) -> str:
    """The chat template, in which strftime_now is a macro that returns TODAY."""
    if "strftime_now" not in template or "macro strftime_now" in template:
        return template
    # A macro shadows transformers' function; arguments of apply_chat_template must be data.
    replaced = "".join(f".replace({part!r}, {TODAY.strftime(part)!r})" for part in DATE_PARTS)
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
    # The line feed goes with the block's end: the template still begins where a line begins.
    return f"{macro}\n{template}"


def without_mark_at_end(template: str) -> str:
    """The template that was given to with_mark_at_end; another one as it is."""
    return MARK_AT_END.sub("", template)
