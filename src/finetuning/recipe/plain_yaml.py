"""Text of a recipe -> settings and the lines they stand in: YAML 1.2 without aliases."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.events import AliasEvent

from finetuning.errors import UserError
from finetuning.recipe.error_messages import KeyPath

MAX_CHARACTERS, MAX_DEPTH = 200_000, 100  # of a recipe


class PlainComposer(Composer):
    """Aliases of aliases make a short recipe a large one: the first alias is an error."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            raise Alias(self.parser.get_event())
        return super().compose_node(parent, index)


class Alias(Exception):
    """An alias in a recipe; its argument is the event of the parser."""


def parse_plain(text: str, place: str) -> tuple[Any, dict[KeyPath, int]]:
    """What the YAML says, and for each setting its line, from 1. `2e-5` is a number, `no` text.

    The text is parsed once: a recipe of 25 lines takes 5 ms, and a script reads some of them.

    Raises UserError for aliases, size and depth, YAMLError for what is not YAML, ValueError for a
    date or a number that Python does not read.
    """
    require_bounded(text, place)
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = PlainComposer
    try:
        node = yaml.compose(text)
    except Alias as found:
        event = found.args[0]
        raise UserError(
            f"{place}:{event.start_mark.line + 1}: *{event.anchor} is an alias; write out what it "
            "stands for"
        ) from None
    if node is None:
        return None, {}
    return yaml.constructor.construct_document(node), dict(node_lines(node))


def require_bounded(text: str, place: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{place}: has {len(text):,} characters; at most {MAX_CHARACTERS:,}")
    brackets = ({"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0) for character in text)
    if max(accumulate(brackets), default=0) > MAX_DEPTH:  # ruamel's time grows with its square
        raise UserError(f"{place}: is nested too deeply")


def node_lines(node: Any, key: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Key path and line (from 1) of every setting below a YAML node."""
    if isinstance(node.value, str):
        return
    for index, child in enumerate(node.value):
        of_key, value = child if isinstance(child, tuple) else (child, child)
        name = of_key.value if isinstance(child, tuple) else index
        if isinstance(name, list):
            continue  # a key that is a list or mapping has no name; it is refused later
        yield (*key, name), of_key.start_mark.line + 1
        yield from node_lines(value, (*key, name))
