"""A text file of overrides -> the runs of a sweep, a line each."""

import shlex
from pathlib import Path

from finetuning.errors import UserError


def read_sweep(file: Path, shared: list[str]) -> dict[str, list[str]]:
    """{number from 1: overrides}, of each run its folder, the shared ones and those of its line.

    Empty lines and comments (#) do not count; arguments are quoted as in a shell. Raises UserError.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a file of overrides: {error}") from None
    runs: dict[str, list[str]] = {}
    for line in lines:
        if line.strip() and not line.lstrip().startswith("#"):
            number = str(len(runs) + 1)
            folder = f"training.output_dir=outputs/{file.stem}/{number}"
            runs[number] = [folder, *shared, *words_of(file, line)]
    if not runs:
        raise UserError(f"{file}: has no overrides; expected a line for each run")
    return runs


def words_of(file: Path, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UserError(f"{file}: line {line!r}: {error}") from None
