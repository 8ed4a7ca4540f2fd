"""Does a published model, pulled anew, answer as its run folder does?"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.hub.download import pull
from finetuning.inference.agreement import Answer, ask_greedily, questions_of
from finetuning.publishing.commit import Published
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.folder import now

if TYPE_CHECKING:
    from rich.console import Console

RECORD = "published.json"  # in the run folder


def compare_answers(folder: Path, recipe: Recipe, published: Published) -> list[Answer]:
    """Greedy answers to the recipe's questions: by the run folder, and by the published commit.

    The commit is pulled to a fresh cache, and each is asked with its own recipe: a published
    adapter goes on the base model that its readers will take. Raises UserError where that cannot
    be had.
    """
    questions = questions_of(recipe)
    ours = ask_greedily(folder, recipe, questions)
    with tempfile.TemporaryDirectory(prefix="published-") as cache:
        snapshot = pull(published.address, Path(cache))
        try:
            readers_recipe = load_recipe(snapshot.folder / "recipe.yaml")
            theirs = ask_greedily(snapshot.folder, readers_recipe, questions)
        except UserError as error:
            raise type(error)(f"published, but it cannot be asked: {error}") from None
    return [Answer(*row) for row in zip(questions, ours, theirs, strict=True)]


def write_record(folder: Path, published: Published, answers: list[Answer]) -> None:
    """published.json of the run folder: where it was published, and what was answered."""
    record = {
        "repo": published.address.repo,
        "subfolder": published.address.subfolder,
        "commit": published.address.revision,
        "tag": published.tag,
        "at": now(),
        "answers": [answer.record("published") for answer in answers],
    }
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def require_agreement(console: "Console", answers: list[Answer], is_exact: bool) -> None:
    """Says how many answers are the same.

    Raises UserError unless all are, where the weights are the very same bytes (`is_exact`).
    """
    other = [answer for answer in answers if not answer.is_same]
    for question, ours, theirs in other:
        console.print(f"{question}\n  run folder: {ours}\n  published:  {theirs}")
    if other and is_exact:
        raise UserError(
            f"published, but {len(other)} of {len(answers)} answers are not the run folder's; "
            f"see {RECORD}"
        )
    why = " (merging rounds the weights once more)" if other else ""
    if answers:
        same = len(answers) - len(other)
        console.print(f"{same} of {len(answers)} greedy answers are the run folder's{why}")
