"""What stands behind a script's name: files and folders, flags, overrides."""

import argparse
import fnmatch
from collections.abc import Sequence
from typing import NoReturn

from finetuning.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with mistakes as UserError in one line.

    The manual is the docstring of the script; script.run prints it.
    """

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--verbose", action="store_true")  # see script.run

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments by name; flags may stand anywhere. Raises UserError for unknown ones."""
        return self.parse_intermixed_args(arguments)

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise UserError(f"{message}; {usage}")


def require_section(overrides: Sequence[str], *allowed: str) -> None:
    """Raises UserError for an override of a setting that was decided by training.

    Allowed are a section, such as `publish.*`, or one key, such as `model.quantization`.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed):
            names = " and ".join(allowed)
            raise UserError(f"override {override!r}: after training only {names} may change")
