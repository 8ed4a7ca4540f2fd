"""A YAML file -> plain settings, and `file:line` of each: a message says where a key stands."""

from pathlib import Path
from typing import Any

from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from finetuning.errors import UserError, did_you_mean, one_line
from finetuning.recipe.error_messages import KeyPath
from finetuning.recipe.plain_yaml import parse_plain


def read_yaml(path: Path) -> tuple[Any, dict[KeyPath, str]]:
    """What the file holds, and for each setting in it `file:line`.

    Raises UserError for what cannot be read, and for what makes a short recipe a large one.
    """
    text = read_text(path)
    try:
        settings, lines = parse_plain(text, str(path))
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        raise UserError(f"{path}:{line}: {error.problem.split(' with')[0]}") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{place}: is not YAML: {problem}") from None
    except ValueError as error:  # a date or a number that Python does not read
        raise UserError(f"{path}: is not a recipe: {one_line(error)}") from None
    return settings, {key: f"{path}:{line}" for key, line in lines.items()}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe{similar_recipe(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a recipe is a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text, a recipe is a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def similar_recipe(path: Path) -> str:
    return did_you_mean(str(path), [str(other) for other in path.parent.glob("*.yaml")])
