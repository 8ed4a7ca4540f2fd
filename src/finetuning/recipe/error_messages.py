"""What is wrong with a recipe, in one line: where, what was found, what is allowed."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from finetuning.errors import did_you_mean, nearest
from finetuning.recipe.ownership import OWNED, RENAMED
from finetuning.section import Section

KeyPath = tuple[str | int, ...]  # ("data", "path", 0, "reader")
Fields = Mapping[str, FieldInfo]  # a section's, by name


def explain(
    error: ValidationError,
    root: Fields,
    settings: dict[str, Any],
    places: dict[KeyPath, str],
    path: str,
) -> str:
    """The first problem in one line, and how many more there are.

    `root` are the fields of the whole recipe.
    """
    problems: dict[KeyPath, list[ErrorDetails]] = {}
    for problem in error.errors():
        problems.setdefault(key_path(problem, settings), []).append(problem)
    # A value that may be text or a list is refused as text too, and that says less than what is
    # wrong in the list.
    problems = {
        key: found
        for key, found in problems.items()
        if not any(is_inside(other, key) for other in problems)
    }
    # A misspelt key comes before what is then missing, and a reader before all: it decides which
    # keys there are.
    key, found = min(
        problems.items(),
        key=lambda item: (
            item[0][-1:] != ("reader",),
            item[1][0]["type"] not in ("extra_forbidden", "invalid_key"),
        ),
    )
    place = next((places[key[:end]] for end in range(len(key), 0, -1) if key[:end] in places), path)
    more = [".".join(map(str, other)) for other in problems if other != key]
    also = f" (and {len(more)} more: {', '.join(more[:3])})" if more else ""
    return f"{place}: {describe_problem(root, key, found)}{also}"


def is_inside(key: KeyPath, outer: KeyPath) -> bool:
    return len(key) > len(outer) and key[: len(outer)] == outer


def key_path(problem: ErrorDetails, settings: Any) -> KeyPath:
    """Where in the recipe the problem is: pydantic's location less the names of the union members
    it tried."""
    key: KeyPath = ()
    for part in problem["loc"]:
        is_index = isinstance(settings, list) and isinstance(part, int) and part < len(settings)
        if is_index or (isinstance(settings, dict) and part in settings):
            settings = settings[part]
        elif problem["type"] == "missing" and part == problem["loc"][-1]:
            pass
        else:
            continue
        key = (*key, part)
    return key


def describe_problem(root: Fields, key: KeyPath, problems: list[ErrorDetails]) -> str:
    name, kind = ".".join(map(str, key)), problems[0]["type"]
    if kind == "extra_forbidden":
        return unknown_key(root, key)
    if kind == "missing":
        allowed = allowed_values(root, key)
        return f"{name} is missing" + (f"; allowed are {', '.join(allowed)}" if allowed else "")
    if kind == "invalid_key":
        return f"key {shown(problems[0]['input'])}; expected text"
    if kind == "value_error":
        return ": ".join(filter(None, (name, str(problems[0]["ctx"]["error"]))))
    found = shown(problems[0]["input"])
    choices = allowed_values(root, key)
    if choices:
        hint = did_you_mean(problems[0]["input"], choices)
        return f"{name} is {found}; allowed are {', '.join(choices)}{hint}"
    if kind == "string_pattern_mismatch":
        return f"{name} is {found}; expected {section_at(root, key[:-1])[str(key[-1])].description}"
    expected = " or ".join(
        dict.fromkeys(EXPECTED.get(p["type"], plain(p["msg"])) for p in problems)
    )
    return f"{name} is {found}; expected {expected}"


EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "too_short": "text or a list that is not empty",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
}


def plain(message: str) -> str:
    for opening in ("Input should be ", "String should have ", "String should "):
        message = message.removeprefix(opening)
    return message.replace("greater than or equal to", "at least").replace(
        "less than or equal to", "at most"
    )


def allowed_values(root: Fields, key: KeyPath) -> list[str]:
    """The choices of a setting that has a fixed set of them, alone or in a list."""
    *section, name = (part for part in key if isinstance(part, str))
    field = section_at(root, tuple(section)).get(name)
    values = {
        str(value): None
        for member in members_of(field.annotation if field else None)
        if get_origin(member) is Literal
        for value in get_args(member)
    }
    return list(values)


def section_at(root: Fields, key: KeyPath) -> Fields:
    """The fields a section has, by the path of its keys."""
    fields = root
    for part in key:
        if isinstance(part, int):
            continue
        members = members_of(fields[part].annotation) if part in fields else ()
        sections = [m for m in members if isinstance(m, type) and issubclass(m, Section)]
        fields = sections[0].model_fields if sections else {}
    return fields


def members_of(annotation: Any) -> Iterator[Any]:
    """The annotation and what it is made of: `list[Source] | None`, `list[Source]`, `Source`,
    `None`."""
    yield annotation
    for inner in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from members_of(inner)


def unknown_key(root: Fields, key: KeyPath) -> str:
    name, section = str(key[-1]), ".".join(map(str, key[:-1]))
    prefix = f"{section}." if section else ""
    allowed = sorted(section_at(root, key[:-1]))
    if owner := OWNED.get(section, {}).get(name):
        return f"{prefix}{name} belongs to {owner}"
    if name in RENAMED:
        return f"{prefix}{name} has a new name: write {RENAMED[name]}"
    if hint := did_you_mean(name, allowed, prefix):
        return f"unknown key {prefix}{name}{hint}{listed(allowed)}"
    if other := owner_of(root, name):
        return f"unknown key {prefix}{name}; did you mean {other}.{name}?"
    near = ", ".join(nearest(name, allowed, count=3, similarity=0.0))
    return f"unknown key {prefix}{name}{listed(allowed) or f' (nearest are {near})'}"


def owner_of(root: Fields, name: str) -> str | None:
    """The first section that has a key of this name."""
    return next((section for section in root if name in section_at(root, (section,))), None)


def listed(names: list[str]) -> str:
    return f" (allowed are {', '.join(names)})" if 0 < len(names) <= 20 else ""


def shown(value: Any) -> str:
    """A value as YAML has it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # keys that JSON does not know, a list inside itself
        text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
