"""Does a published model, pulled anew, answer as its run folder does?"""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.errors import UserError
from finetuning.export.exported import Trained, compare
from finetuning.files import write_text
from finetuning.hub import allowed_files
from finetuning.hub.download import pull
from finetuning.inference.agreement import Answer, ask_greedily, questions_of
from finetuning.publishing.commit import Published
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.folder import RunFolder, now

if TYPE_CHECKING:
    from rich.console import Console

RECORD = "published.json"  # in the run folder
# Forms that are asked: by this code, by transformers alone, as a GGUF file.
PUBLISHED, PIPELINE, LLAMA_CPP = "published", "transformers' pipeline", "llama.cpp"


def compare_answers(
    run: RunFolder, recipe: Recipe, published: Published
) -> dict[str, list[Answer]]:
    """{form that was published: greedy answers to the recipe's questions, beside the run folder's}.

    The commit is pulled to a fresh cache, and asked with its own recipe (PUBLISHED: an adapter goes
    on the base model that its readers will take), by transformers alone with its chat template, and
    as GGUF in llama.cpp. Raises UserError where the first of them cannot be had.
    """
    questions = questions_of(recipe)
    ours = ask_greedily(run.path, recipe, questions)
    with tempfile.TemporaryDirectory(prefix="published-") as cache:
        snapshot = pull(published.address, Path(cache))
        try:
            readers_recipe = load_recipe(snapshot.folder / "recipe.yaml")
            theirs = ask_greedily(snapshot.folder, readers_recipe, questions)
        except UserError as error:
            raise type(error)(f"published, but it cannot be asked: {error}") from None
        forms = {PUBLISHED: paired(questions, ours, theirs)}
        model = Trained(RunFolder(snapshot.folder), readers_recipe)
        if model.chat_template and not (snapshot.folder / allowed_files.ADAPTER_WEIGHTS).is_file():
            forms[PIPELINE] = paired(questions, ours, ask_pipeline(model, questions))
        for file in snapshot.folder.glob("*.gguf"):
            forms[LLAMA_CPP] = compare(run.path, recipe, file)
    return {form: answers for form, answers in forms.items() if answers}


def paired(questions: list[str], ours: list[str], theirs: list[str]) -> list[Answer]:
    return [Answer(*row) for row in zip(questions, ours, theirs, strict=True)]


def ask_pipeline(model: Trained, questions: list[str]) -> list[str]:
    """Greedy answers of transformers' pipeline to chats, with the folder's own settings."""
    from transformers import pipeline

    folder = str(model.run.path)
    ask = pipeline("text-generation", model=folder, tokenizer=folder, device="cpu")
    positions = getattr(ask.model.config, "max_position_embeddings", None) or sys.maxsize
    answers = []
    for question in questions:
        asked = [{"role": "user", "content": question}]
        prompt = model.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=False
        )
        # An answer longer than the model reads is an IndexError in transformers, cut in ours.
        longest = min(model.recipe.generation.max_new_tokens, positions - len(prompt))
        chat = ask(asked, do_sample=False, max_new_tokens=longest)[0]["generated_text"]
        answers.append(model.template.strip_markers(chat[-1]["content"]))
    return answers


def write_record(folder: Path, published: Published, forms: dict[str, list[Answer]]) -> None:
    """published.json of the run folder: where it was published, and what was answered."""
    record = {
        "repo": published.address.repo,
        "subfolder": published.address.subfolder,
        "commit": published.address.revision,
        "tag": published.tag,
        "at": now(),
        "answers": [answer.record(PUBLISHED) for answer in forms.get(PUBLISHED, [])],
        "forms": {
            form: {"asked": len(answers), "same": sum(answer.is_same for answer in answers)}
            for form, answers in forms.items()
        },
    }
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def print_agreement(console: "Console", forms: dict[str, list[Answer]]) -> None:
    """How many answers of the other forms are the run folder's."""
    for form, answers in forms.items():
        same = sum(answer.is_same for answer in answers)
        console.print(f"{same} of {len(answers)} answers of {form} are the run folder's")


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
