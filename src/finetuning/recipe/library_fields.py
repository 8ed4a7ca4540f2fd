"""The settings of trl, peft and transformers that a recipe may use: names, types, defaults.

Importing those libraries takes ten seconds, and a misspelt key should be refused at once: so their fields are written
down in library_fields.json, from which `sections` builds those of a recipe. After an upgrade write the table (and the
JSON schema that editors use) again:

    PYTHONPATH=src python -m finetuning.library_fields
"""

import json
import re
from pathlib import Path
from typing import Any, Literal, Union

TABLE = Path(__file__).with_suffix(".json")


TYPES = {
    "boolean": bool,
    "integer": int,
    "number": float,
    "string": str,
    "array": list,
    "object": dict,
    "null": None,
}


Field = dict[
    str, Any
]  # {"types": names of TYPES, "choices": values instead of "string" or null, "default", "help"}


def load_library_fields() -> dict[str, dict[str, Field]]:
    """{"training" | "lora" | "generation": {field name: Field}} as last written down."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def python_type(field: Field) -> Any:
    """The annotation a recipe's value is checked against, such as `float | None` or `Literal["no", "steps"]`."""
    members = [TYPES[name] for name in field["types"]]
    if field["choices"]:
        members.append(Literal[tuple(field["choices"])])
    return Union[tuple(members)]  # noqa: UP007 - the members are known at run time only


def read_library_fields() -> dict[str, dict[str, Field]]:
    """The same table, asked of the installed libraries: slow, for writing and for testing the written one."""
    from peft import LoraConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import SFTConfig

    training = read_dataclass(SFTConfig)
    training["report_to"]["types"].remove("string")
    training["report_to"]["choices"] = ["none", *sorted(INTEGRATION_TO_CALLBACK)]
    return {
        "training": training,
        "lora": read_dataclass(LoraConfig),
        "generation": read_generation_config(),
    }


def read_dataclass(cls: type) -> dict[str, Field]:
    import dataclasses
    import typing

    hints = typing.get_type_hints(cls)
    fields = {}
    for field in dataclasses.fields(cls):
        types, choices = describe(hints[field.name])
        choices = list(field.metadata.get("choices") or choices)
        if choices:
            types -= {"string"}
        default = field.default if is_plain(field.default) else None
        help = field.metadata.get("help", "")
        fields[field.name] = make_field(types, choices, getattr(default, "value", default), help)
    return fields


def read_generation_config() -> dict[str, Field]:
    """GenerationConfig is no dataclass: its names are those of its dict, its types stand in its docstring."""
    from transformers import GenerationConfig

    documented = dict(
        re.findall(r"^ {8}(\w+) ?\(`?(.*?)\)?:\s*$", GenerationConfig.__doc__, re.MULTILINE)
    )
    named = {
        "bool": "boolean",
        "int": "integer",
        "float": "number",
        "str": "string",
        "list": "array",
        "dict": "object",
    }
    fields = {}
    for name in GenerationConfig().to_dict():
        if name.startswith("_") or name == "transformers_version":
            continue
        declared = documented.get(name, "").split(", *optional*")[0]
        words = [
            word for word in re.findall(r"\w+", re.sub(r"\[.*?\]+", "", declared)) if word in named
        ]
        types = {named[word] for word in words} or set(TYPES)
        fields[name] = make_field(types | {"null"}, [], None, "")
    return fields


def describe(hint: Any) -> tuple[set[str], list[Any]]:
    """A type hint as names of TYPES and the values of its enumerations."""
    import enum
    import types
    import typing

    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        members = [describe(member) for member in typing.get_args(hint)]
        return set().union(*(names for names, _ in members)), [
            choice for _, more in members for choice in more
        ]
    if origin is Literal:
        # A choice such as 'pissa_niter_[number of iters]' stands for many texts: then any text is allowed.
        choices = typing.get_args(hint)
        return (
            ({"string"}, [])
            if any("[" in str(choice) for choice in choices)
            else (set(), list(choices))
        )
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return set(), [member.value for member in hint]
    for name, python in TYPES.items():
        if hint is python or origin is python or (python is None and hint is type(None)):
            return {name}, []
    return {"object"}, []  # a config class of the library, written in YAML as a mapping


def make_field(types: set[str], choices: list[Any], default: Any, help: str) -> Field:
    types = {"null", *types} if default is None else types
    sentence = re.split(r"(?<=\.)\s", " ".join(help.split()))[0]
    return {
        "types": [name for name in TYPES if name in types],
        "choices": choices,
        "default": default,
        "help": sentence,
    }


def is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None)))


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":  # make schema
    TABLE.write_text(as_json(read_library_fields()), encoding="utf-8")
