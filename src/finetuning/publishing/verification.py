"""Does what is published answer as its run folder does, in every form that others can take it?"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetuning.errors import UserError
from finetuning.evaluation.results import TRAINED
from finetuning.export.exported import Trained, compare
from finetuning.files import write_text
from finetuning.hub import allowed_files
from finetuning.hub.download import pull
from finetuning.inference.agreement import Agreement, Answer, ask_greedily, questions_of
from finetuning.publishing.bundle import Bundle, as_published
from finetuning.publishing.commit import Published
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.environment import now
from finetuning.runs.folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

RECORD = "published.json"  # in the run folder
PUBLISHED, ADAPTER = "published", "adapter on its base model"  # asked by this code
# By transformers alone, and as a GGUF file.
GENERATE, PIPELINE, SERVE = "transformers", "transformers' pipeline", "transformers serve"
LLAMA_CPP = "llama.cpp"


class Form(NamedTuple):
    """A form of the model, and its answers beside the run folder's."""

    name: str
    answers: list[Answer]

    @property
    def other(self) -> list[Answer]:
        """Those that are not the same."""
        return [answer for answer in self.answers if not answer.is_same]

    @property
    def agreement(self) -> Agreement:
        return Agreement(self.name, len(self.answers), len(self.answers) - len(self.other))


def ask_forms(bundle: Bundle, recipe: Recipe) -> list[Form]:
    """Every form that is published, asked the recipe's questions greedily.

    First with the recipe that is published (PUBLISHED: an adapter is loaded on the base model that
    its readers will take), from a folder that holds what they will have. Raises UserError where
    that one cannot be asked.
    """
    questions = questions_of(recipe)
    ours = ask_greedily(bundle.run.path, recipe, questions)
    with bundle.staged() as folder:
        model = Trained(RunFolder(folder), load_recipe(folder / "recipe.yaml"))
        try:
            theirs = ask_greedily(folder, model.recipe, questions)
        except UserError as error:
            raise type(error)(f"not published: it cannot be asked: {error}") from None
        asked = [(PUBLISHED, theirs), *ask_others(model, questions)]
        forms = [Form(name, paired(questions, ours, theirs)) for name, theirs in asked]
        gguf = [Form(LLAMA_CPP, compare(bundle.run.path, recipe, f)) for f in folder.glob("*.gguf")]
    return [form for form in [*forms, *gguf] if form.answers]


def ask_others(model: Trained, questions: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(form, its answers) of an adapter beside full weights, and of stock transformers."""
    from finetuning.publishing.stock_transformers import Stock, ask_server, can_serve

    folder = model.run.path
    if (folder / allowed_files.ADAPTER_FOLDER).is_dir():
        weights = folder / allowed_files.ADAPTER_FOLDER
        yield ADAPTER, ask_greedily(folder, model.recipe, questions, weights=weights)
    if (folder / allowed_files.ADAPTER_WEIGHTS).is_file():
        return  # transformers needs full weights
    stock = Stock(model)
    yield GENERATE, [stock.generate(question) for question in questions]
    if model.chat_template:
        yield PIPELINE, [stock.chat(question) for question in questions]
        if can_serve():
            yield SERVE, ask_server(model, questions)


def paired(questions: list[str], ours: list[str], theirs: list[str]) -> list[Answer]:
    return [Answer(*row) for row in zip(questions, ours, theirs, strict=True)]


def require_agreement(console: "Console", forms: list[Form], is_exact: bool) -> None:
    """Says how many answers of the published model are the same.

    Raises UserError unless all are, where the weights are the same bytes (`is_exact`).
    """
    for form in [form for form in forms if form.name == PUBLISHED]:
        asked = len(form.answers)
        for question, ours, theirs in form.other:
            console.print(f"{question}\n  run folder: {ours}\n  published:  {theirs}")
        if form.other and is_exact:
            raise UserError(
                f"not published: {len(form.other)} of {asked} answers are not the run folder's; "
                "--unasked publishes all the same"
            )
        why = " (merging rounds the weights once more)" if form.other else ""
        same = form.agreement.same
        console.print(f"{same} of {asked} greedy answers are the run folder's{why}")


def print_agreement(console: "Console", forms: list[Form]) -> None:
    """How many answers of the other forms are the run folder's."""
    for name, asked, same in (form.agreement for form in forms if form.name != PUBLISHED):
        console.print(f"{same} of {asked} answers of {name} are the run folder's")


def check_published(bundle: Bundle, published: Published) -> None:
    """Pulls the commit to a fresh cache, where every sha256 is verified.

    Raises UserError unless its files are those that were asked.
    """
    with tempfile.TemporaryDirectory(prefix="published-") as cache:
        snapshot = pull(published.address, Path(cache))
    there = snapshot.manifest.files if snapshot.manifest else {}
    above = f"{bundle.address.subfolder}/"
    for path, added in bundle.operations.items():
        name = path.removeprefix(above)
        if there.get(name) != as_published(added):
            raise UserError(f"published, but {name} is not the file that was asked; publish again")


# published.json


def write_record(folder: Path, bundle: Bundle, published: Published, forms: list[Form]) -> None:
    """published.json of the run folder: where it was published, and what was answered."""
    answers = [answer for form in forms if form.name == PUBLISHED for answer in form.answers]
    record = {
        "repo": published.address.repo,
        "subfolder": published.address.subfolder,
        "commit": published.address.revision,
        "tag": published.tag,
        "at": now(),
        "answers": [answer.record(PUBLISHED) for answer in answers],
        "forms": {name: {"asked": asked, "same": same} for name, asked, same in bundle.agreements},
        "files": bundle.digest,
        "scores": scores_of(bundle.run.evaluation),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / RECORD, text)


def scores_of(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of the trained model, {questions, score: {mean, low, high}}; None for a run without any."""
    if evaluation is None or TRAINED not in evaluation["scores"]:
        return None
    return {"questions": evaluation["questions"], **evaluation["scores"][TRAINED]}


def read_agreements(folder: Path, bundle: Bundle) -> list[Agreement]:
    """What was recorded when the same files were asked before; nothing for other files."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record.get("files") != bundle.digest:
            return []
        forms = record["forms"].items()
        return [Agreement(name, int(form["asked"]), int(form["same"])) for name, form in forms]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
