"""What a killed evaluation had found: a line that says what is asked of which models, then a line
for each round of results.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.runs.metrics import read_lines


@dataclass(frozen=True)
class Unfinished:
    """The file that is there as long as an evaluation is not whole."""

    file: Path

    def begin(self, head: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rounds of a killed call; the file then ends with a whole line.

        Raises UserError where it is of something else than `head`, or cannot be written.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.file.parent}: cannot be written: {error.strerror}") from None
        lines = read_lines(self.file)
        if lines:
            require_same(lines[0], head, self.file)
        rounds = lines[1:]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in [head, *rounds]))
        return rounds

    def add(self, found: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")

    def end(self) -> None:
        self.file.unlink()


def require_same(before: Any, head: Mapping[str, Any], file: Path) -> None:
    if before != head:
        raise UserError(
            f"{file} is of other models, questions or settings; delete it, or choose another "
            "folder with --output"
        )
