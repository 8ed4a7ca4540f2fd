"""Which chat template: the tokenizer's own, one of its named ones, a file, or one of trl's."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.data.jinja_source import literal
from finetuning.data.section import Data
from finetuning.data.templates import CHAT
from finetuning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Named = str | dict[str, str] | None


def set_chat_template(data: Data, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Gives the base model's tokenizer the chat template that the recipe names.

    A trained model's tokenizer has it already. Raises UserError as `chat_template_of`.
    """
    if data.template == CHAT:
        own: Any = tokenizer.chat_template
        template: Any = chat_template_of(own, data.chat_template, data.chat_template_kwargs)
        tokenizer.chat_template = template


def chat_template_of(
    tokenizers_own: Named, name: str | None, settings: dict[str, Any]
) -> str | None:
    """The chat template that a recipe names, with its `chat_template_kwargs` written into it.

    Raises UserError where there is no such template, or several and none is chosen.
    """
    template = tokenizers_own if name is None else named(name, tokenizers_own)
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f"the tokenizer has the chat templates {', '.join(template)}; "
                "choose one with data.chat_template"
            )
        template = template["default"]
    return with_settings(template, settings) if template else template


def named(name: str, tokenizers_own: Named) -> str:
    """The template of this name: one of the tokenizer's, a file, or one of trl's."""
    own = tokenizers_own if isinstance(tokenizers_own, dict) else {}
    if name in own:
        return own[name]
    shipped = shipped_templates()
    if name in shipped:
        return shipped[name]
    if (file := Path(name).expanduser()).is_file():
        return read(file)
    names = [*own, *shipped]
    raise UserError(
        f"data.chat_template: {name} is no file, and no chat template of the tokenizer or of trl"
        f"{did_you_mean(name, names)}"
    )


def with_settings(template: str, settings: dict[str, Any]) -> str:
    """The template with these variables set, unless whoever applies it sets them."""
    sets = [
        f"{{% if {name} is not defined %}}{{% set {name} = {jinja_value(value)} %}}{{% endif %}}"
        for name, value in settings.items()
    ]
    return "".join(sets) + "\n" + template if sets else template


def jinja_value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return literal(value)


def training_variant(template: str) -> str | None:
    """The name of trl's form for training of this chat template, if trl has one."""
    shipped = shipped_templates()
    forms = (
        f"{name}_training" for name, original in shipped.items() if template.endswith(original)
    )
    return next((form for form in forms if form in shipped), None)


@cache
def shipped_templates() -> dict[str, str]:
    """The chat templates that trl ships; found without importing it (10 s)."""
    found = find_spec("trl")
    folders = list(found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in Path(folder).glob("chat_templates/*.jinja")]
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(files)}


def read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: {file}: cannot be read: {error}") from None
