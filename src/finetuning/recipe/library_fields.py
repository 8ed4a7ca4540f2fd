"""The settings of trl, peft and transformers, asked of the installed libraries.

Importing them takes ten seconds, and a misspelt key should be refused at once: so `make schema`
writes their fields as library_sections.py, with names, types, defaults and the first sentence of
their manuals. Run it after an upgrade.
"""

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from finetuning.recipe.bounds import BOUNDS
from finetuning.recipe.ownership import OWNED, RENAMED

RUFF = (sys.executable, "-m", "ruff")
INDENT = " " * 4
FILE = Path(__file__).with_name("library_sections.py")

HEAD = '''\
"""The fields of trl, peft and transformers that a recipe may set; written by `make schema`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from finetuning.section import Section
'''

CLASSES = {
    "training": ("SFTConfigFields", "Of trl.SFTConfig, those that no other section owns."),
    "lora": ("LoraConfigFields", "Of peft.LoraConfig, those that no other section owns."),
    "generation": (
        "GenerationConfigFields",
        "Of transformers.GenerationConfig, those that no other section owns.",
    ),
}

# In the order in which a union names them.
TYPES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    list: "list[Any]",
    dict: "dict[str, Any]",
    type(None): "None",
}

# Fields of GenerationConfig that its manual does not name.
UNDOCUMENTED = {"begin_suppress_tokens": "list[int]", "use_mtp": "bool"}


@dataclass(frozen=True)
class LibraryField:
    """A setting of a library as its own class declares it."""

    types: frozenset[type]
    """members of TYPES"""
    choices: tuple[Any, ...] = ()
    """values of an enumeration, instead of any text"""
    default: Any = None
    help: str = ""
    """what it is, in a sentence"""


def read_library_fields() -> dict[str, dict[str, LibraryField]]:
    """{"training" | "lora" | "generation": {name: field}} of the installed libraries, less those of
    other owners."""
    from peft import LoraConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import SFTConfig

    training = read_dataclass(SFTConfig)
    loggers = ("none", *sorted(INTEGRATION_TO_CALLBACK))
    training["report_to"] = make_field({list, type(None)}, loggers, "none", "The loggers to use.")
    eval_batch = training["per_device_eval_batch_size"]
    training["per_device_eval_batch_size"] = make_field(eval_batch.types, help=eval_batch.help)
    fields = {
        "training": training,
        "lora": read_dataclass(LoraConfig),
        "generation": read_generation_config(),
    }
    return {
        section: {
            name: field
            for name, field in found.items()
            if name not in OWNED[section] and name not in RENAMED
        }
        for section, found in fields.items()
    }


def read_dataclass(cls: type) -> dict[str, LibraryField]:
    import dataclasses
    import typing

    hints = typing.get_type_hints(cls)
    fields = {}
    for field in dataclasses.fields(cls):
        types, found = members(hints[field.name])
        choices = tuple(field.metadata.get("choices") or found)
        if choices:
            types -= {str}
        default = getattr(field.default, "value", field.default)
        help = field.metadata.get("help", "")
        fields[field.name] = make_field(types, choices, default, help)
    return fields


def read_generation_config() -> dict[str, LibraryField]:
    """GenerationConfig is no dataclass: its names are those of its dict, its types stand in its
    docstring."""
    from transformers import GenerationConfig

    manual = GenerationConfig.__doc__ or ""
    documented = dict(re.findall(r"^ {8}(\w+) ?\(`?(.*?)\)?:\s*$", manual, re.MULTILINE))
    names = [name for name in GenerationConfig().to_dict() if name != "transformers_version"]
    return {
        name: make_field(documented_types(documented.get(name) or UNDOCUMENTED[name]))
        for name in names
        if not name.startswith("_") and name not in OWNED["generation"] | RENAMED
    }


def documented_types(declared: str) -> set[type]:
    """Of a docstring's "`int` or `list[int]`, *optional*"; any, where it says nothing."""
    named: dict[str, type] = {cls.__name__: cls for cls in TYPES} | {"tuple": list}
    text = declared.partition(", *optional*")[0].removeprefix("Union[")
    while (outer := re.sub(r"\[[^][]*\]|\([^()]*\)", "", text)) != text:
        text = outer
    types = {named[word] for word in re.findall(r"\w+", text) if word in named}
    return types | {type(None)}


def members(hint: Any) -> tuple[set[type], list[Any]]:
    """A type hint as members of TYPES and the values of its enumerations."""
    import enum
    import types
    import typing

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        parts = [members(argument) for argument in arguments]
        return set().union(*(part[0] for part in parts)), [c for part in parts for c in part[1]]
    if origin is Literal:
        # A choice such as 'pissa_niter_[number of iters]' stands for many texts: then any is
        # allowed.
        is_open = any("[" in str(choice) for choice in arguments)
        return ({str}, []) if is_open else (set(), list(arguments))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return set(), [member.value for member in hint]
    # A config class of the library is written in YAML as a mapping.
    return {next((cls for cls in TYPES if cls in (hint, origin)), dict)}, []


def make_field(
    types: Set[type], choices: Iterable[Any] = (), default: Any = None, help: str = ""
) -> LibraryField:
    """With the first sentence of its help, and null allowed where it is the default."""
    if not isinstance(default, (bool, int, float, str)):
        default, types = None, types | {type(None)}
    sentence = re.split(r"(?<=\.)\s", " ".join(help.split()))[0]
    return LibraryField(frozenset(types), tuple(choices), default, sentence)


def library_sections(fields: dict[str, dict[str, LibraryField]]) -> str:
    """The module library_sections.py: a class for each section, as ruff formats it."""
    classes = (class_source(section, found) for section, found in fields.items())
    command = [*RUFF, "format", "--stdin-filename", str(FILE), "-"]
    source = "\n\n".join([HEAD, *classes])
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def class_source(section: str, fields: dict[str, LibraryField]) -> str:
    name, manual = CLASSES[section]
    lines = [f"class {name}(Section):", f'    """{manual}"""', ""]
    for field_name, field in fields.items():
        lines += field_source(field_name, field, BOUNDS[section].get(field_name, {}))
    return "\n".join(lines) + "\n"


def field_source(name: str, field: LibraryField, bounds: dict[str, int]) -> Iterator[str]:
    """Its annotation, default and bounds, and what it is as the docstring that an editor shows."""
    limits = "".join(f", {limit}={value}" for limit, value in bounds.items())
    types: dict[Any, str] = {cls: TYPES[cls] for cls in TYPES if cls in field.types}
    if field.choices:
        choice = f"Literal{[*field.choices]}"
        types = {Literal: choice} | types | ({list: f"list[{choice}]"} if list in types else {})
    if limits and len(field.types - {type(None)}) > 1:  # of the numbers of a union only
        for number in {int, float} & types.keys():
            types[number] = f"Annotated[{TYPES[number]}, Field({limits[2:]})]"
        limits = ""
    default = f"Field(default={field.default!r}{limits})" if limits else repr(field.default)
    yield f"    {name}: {' | '.join(types.values())} = {default}"
    if field.help:
        manual = field.help.replace("\\", "\\\\").replace('"', "'")
        yield textwrap.fill(f'"""{manual}"""', 100, initial_indent=INDENT, subsequent_indent=INDENT)


if __name__ == "__main__":  # make schema
    FILE.write_text(library_sections(read_library_fields()), encoding="utf-8")
