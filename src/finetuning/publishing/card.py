"""README.md of a published model."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from finetuning.evaluation.results import TRAINED
from finetuning.evaluation.scores import BETTER_IF_HIGHER, SCORES
from finetuning.evaluation.table import score_rows
from finetuning.hub.address import Address
from finetuning.hub.manifest import Manifest
from finetuning.inference.agreement import Agreement, questions_of
from finetuning.publishing.card_facts import (
    lora_fact,
    made_of,
    made_with,
    method_tag,
    summary,
    training_table,
)
from finetuning.publishing.card_usage import asking, loading
from finetuning.recipe.recipe import Recipe
from finetuning.runs.folder import RunFolder
from finetuning.runs.samples import read_samples, sample_parts
from finetuning.untrusted_text import cell

TEMPLATE = Path(__file__).with_name("model_card.md")
# Forms in which it is asked, where the name in published.json does not say enough.
FORMS = {"published": "`src/generate.py`", "transformers": "`model.generate` of transformers"}


def model_card(
    address: Address,
    manifest: Manifest,
    recipe: Recipe,
    run: RunFolder,
    files: Collection[str],
    tag: str,
    agreements: list[Agreement],
) -> str:
    """The card of one subfolder with these files, published under the tag.

    `recipe` is the one that is published, `agreements` are those of the forms that were asked.
    """
    card = ModelCard.from_template(
        metadata(address, manifest, recipe, run),
        template_path=str(TEMPLATE),
        address=address,
        tag=tag,
        **facts(manifest, recipe),
        **usage(address, manifest, recipe, run),
        **results(run, files, agreements),
    )
    return str(card)


def metadata(address: Address, manifest: Manifest, recipe: Recipe, run: RunFolder) -> ModelCardData:
    """What the Hub reads of a card."""
    return ModelCardData(
        license=recipe.publish.license if recipe.publish else None,
        library_name="peft" if manifest.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=manifest.base.name if manifest.base else None,
        datasets=manifest.data.datasets or None,
        tags=[method_tag(recipe), "trl", *(["lora"] if recipe.lora else [])],
        model_name=address.subfolder,
        eval_results=model_index(run.evaluation, manifest) or None,
    )


def facts(manifest: Manifest, recipe: Recipe) -> dict[str, Any]:
    """What it was made of, and how it was trained."""
    license = recipe.publish.license if recipe.publish else None
    return {
        "kind": manifest.kind,
        "summary": summary(manifest),
        "facts": [*made_of(manifest, license), *lora_fact(recipe)],
        "script": recipe.script,
        "training": [(name, cell(str(v))) for name, v in training_table(recipe, manifest)],
        "versions": ", ".join(cell(f"{name} {version}") for name, version in made_with(manifest)),
    }


def usage(address: Address, manifest: Manifest, recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """How it is loaded and asked."""
    question = questions_of(recipe)[0]
    return {
        "loading": loading(address, manifest.kind, manifest.base),
        "asking": asking(recipe, run.tokenizer, question),
        "question": shlex.quote(question if question.isprintable() else "QUESTION"),
    }


def results(run: RunFolder, files: Collection[str], agreements: list[Agreement]) -> dict[str, Any]:
    """What it answers, how that was scored, and which forms of it answer the same."""
    return {
        "evaluation": run.evaluation,
        "scores": score_rows(run.evaluation),
        "has_plot": "loss.png" in files,
        "gguf": next((name for name in files if name.endswith(".gguf")), None),
        "samples": "\n".join(f"#{part}" for part in sample_parts(read_samples(run.path))),
        "agreements": [
            (FORMS.get(form) or cell(form), asked, same) for form, asked, same in agreements
        ],
    }


def model_index(evaluation: dict[str, Any] | None, manifest: Manifest) -> list[EvalResult]:
    """The means of the trained model, as the Hub shows them beside a model."""
    trained = (evaluation or {}).get("scores", {}).get(TRAINED, {})
    path = manifest.data.path[0]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=path if path in manifest.data.datasets else "local",
            dataset_name=f"evaluation set of {path}",
            metric_type=name,
            metric_name=label,
            metric_value=round(trained[name]["mean"], 2),
        )
        for name, label in SCORES.items()
        if name in BETTER_IF_HIGHER and name in trained
    ]
