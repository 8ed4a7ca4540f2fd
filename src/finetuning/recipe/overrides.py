"""`section.key=value` of the command line: one setting of a recipe replaced."""

from typing import Any

from ruamel.yaml.error import YAMLError

from finetuning.errors import UserError
from finetuning.recipe.error_messages import Fields, KeyPath, is_inside, owner_of, shown
from finetuning.recipe.plain_yaml import parse_plain


def apply_override(
    settings: dict[str, Any], places: dict[KeyPath, str], override: str, sections: Fields
) -> None:
    """Sets one `section.key=value` in place; the value is read as YAML."""
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys) or (len(keys) < 2 and name not in sections):
        hint = with_section(name, text, sections)
        raise UserError(f"override {override!r}: expected section.key=value{hint}")
    value = value_of(name, text, override)
    place = f"override {override!r}"
    inner = settings
    for depth, key in enumerate(keys[:-1], start=1):
        if inner.get(key) is None:
            inner[key] = {}
            places[keys[:depth]] = place
        inner = inner[key]
        if not isinstance(inner, dict):
            found = f"{'.'.join(keys[:depth])} is {shown(inner)}"
            raise UserError(f"{place}: {found}, it has no keys")
    inner[keys[-1]] = value
    for replaced in [key for key in places if is_inside(key, keys)]:
        del places[replaced]
    places[keys] = place


def value_of(name: str, text: str, override: str) -> Any:
    """What the text after the equals sign is as YAML; nothing is null."""
    try:
        return parse_plain(text, f"override {name}")[0]
    except YAMLError as error:
        raise UserError(
            f"override {override!r}: the value is not YAML: {getattr(error, 'problem', error)}"
        ) from None


def with_section(name: str, text: str, sections: Fields) -> str:
    """What an override without a section may have meant."""
    owner = owner_of(sections, name)
    if owner:
        return f"; did you mean {owner}.{name}={text}?"
    return ", such as training.max_steps=10 or training.learning_rate=1e-4"
