"""Does a model in another form answer as its run folder does? Asked greedily, to compare."""

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetuning.inference.trained_model import load_asker
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Generation

QUESTION = "What is the capital of Japan?"  # where the recipe asks none
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
    """One question, answered by the run folder and by another form of the same model."""

    question: str
    run_folder: str
    other: str

    @property
    def is_same(self) -> bool:
        return self.run_folder == self.other

    def record(self, form: str) -> dict[str, Any]:
        """As it is written down, the other form by its name."""
        return {
            "question": self.question,
            "run_folder": self.run_folder,
            form: self.other,
            "is_same": self.is_same,
        }


class Agreement(NamedTuple):
    """How many answers of a form are the run folder's."""

    form: str
    asked: int
    same: int


def questions_of(recipe: Recipe) -> list[str]:
    """What is asked to compare: the recipe's questions."""
    return list(recipe.generation.prompts) or [QUESTION]


def ask_greedily(
    folder: Path,
    recipe: Recipe,
    questions: list[str],
    known: Iterable[str] | None = None,
    weights: Path | None = None,
) -> list[str]:
    """Answers of a run folder without sampling, one model at a time in memory.

    `known` are the only generation settings that are kept, where the other form has no more.
    `weights` is where its weights are, if that is another folder.
    """
    settings = recipe.generation.model_dump(exclude_unset=True, exclude=set(SAMPLING))
    if known is not None:
        settings = {name: value for name, value in settings.items() if name in known}
    greedy = recipe.model_copy(update={"generation": Generation(**settings, do_sample=False)})
    answers = load_asker(folder, greedy, weights)(questions)
    gc.collect()
    return answers
