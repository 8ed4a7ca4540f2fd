"""Whether a published checkpoint, pulled anew, answers as its run folder does."""

import gc
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.hub.download import pull
from finetuning.inference.generation import load_asker
from finetuning.publishing.card import QUESTION
from finetuning.publishing.commit import Published
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.recipe.sections import Generation
from finetuning.runs.folder import now

if TYPE_CHECKING:
    from rich.console import Console


RUN_RECORDS = "published.json"


# What makes answers differ from one time to the next, or means nothing without it.
SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


class Answer(NamedTuple):
    question: str
    run_folder: str
    published: str

    @property
    def is_same(self) -> bool:
        return self.run_folder == self.published


def compare(folder: Path, recipe: Recipe, published: Published) -> list[Answer]:
    """Greedy answers to the recipe's questions, by the run folder and by the published commit in a fresh cache.

    Each with its own recipe: a published adapter goes on the base model that its readers will take. Raises UserError
    where that cannot be had.
    """
    questions = recipe.generation.prompts or [QUESTION]
    ours = ask_once(folder, recipe, questions)
    with tempfile.TemporaryDirectory(prefix="published-") as cache:
        snapshot = pull(published.address, Path(cache))
        try:
            theirs = ask_once(
                snapshot.folder, load_recipe(snapshot.folder / "recipe.yaml"), questions
            )
        except UserError as error:
            raise type(error)(f"published, but it cannot be asked: {error}") from None
    return [Answer(*row) for row in zip(questions, ours, theirs, strict=True)]


def ask_once(folder: Path, recipe: Recipe, questions: list[str]) -> list[str]:
    """One model at a time in memory."""
    settings = recipe.generation.model_dump(exclude_unset=True, exclude=set(SAMPLING))
    greedy = recipe.model_copy(update={"generation": Generation(**settings, do_sample=False)})
    answers = load_asker(folder, greedy)(questions)
    gc.collect()
    return answers


def write_record(folder: Path, published: Published, answers: list[Answer]) -> None:
    """published.json of the run folder: where it is, and what was answered."""
    place = {"repo": published.address.repo, "subfolder": published.address.subfolder}
    rows = [{**answer._asdict(), "is_same": answer.is_same} for answer in answers]
    record = {
        **place,
        "commit": published.address.revision,
        "tag": published.tag,
        "at": now(),
        "answers": rows,
    }
    write_text(folder / RUN_RECORDS, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def require_agreement(console: "Console", answers: list[Answer], is_exact: bool) -> None:
    """Says how many answers are the same. Raises UserError if not all, where the weights are the very same bytes."""
    other = [answer for answer in answers if not answer.is_same]
    for question, ours, theirs in other:
        console.print(f"{question}\n  run folder: {ours}\n  published:  {theirs}")
    if other and is_exact:
        raise UserError(
            f"published, but {len(other)} of {len(answers)} answers are not the run folder's; see {RUN_RECORDS}"
        )
    why = " (merged weights are rounded once more)" if other else ""
    if answers:
        console.print(
            f"{len(answers) - len(other)} of {len(answers)} greedy answers are the run folder's{why}"
        )
