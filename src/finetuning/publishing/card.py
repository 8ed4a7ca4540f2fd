"""README.md of a published model."""

import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from finetuning.data.prepare import load_template
from finetuning.errors import TryAgain, UserError
from finetuning.evaluation.results import TRAINED
from finetuning.evaluation.scores import BETTER_IF_HIGHER, SCORES
from finetuning.evaluation.table import score_rows
from finetuning.hub.address import REPO, Address
from finetuning.hub.client import TIMEOUT, with_retries
from finetuning.hub.manifest import BaseModelSource, Manifest
from finetuning.inference.agreement import Agreement, questions_of
from finetuning.launch.step_size import step_size
from finetuning.recipe.recipe import PreferenceRecipe, Recipe, kind_of
from finetuning.recipe.sections import PreferenceTraining
from finetuning.runs.folder import RunFolder
from finetuning.runs.samples import read_samples, sample_parts
from finetuning.untrusted_text import cell, code_cell, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = Path(__file__).with_name("model_card.md")
LICENCE = r"[\w.-]{1,40}|not stated"
OLD_NAME = r"^[\w.-]{1,96}$"  # of the Hub's first models, such as gpt2, without an owner
LOSS_ON = {
    "response": "responses",
    "last_response": "the last response of a conversation",
    "all": "all tokens",
}
# (behind "fine-tuned", behind what it was trained on)
METHODS = {
    "full": ("", ""),
    "adapter": (" with LoRA", " An adapter."),
    "merged": (" with LoRA", " The adapter is merged into full weights."),
}
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
    question = questions_of(recipe)[0]
    license = recipe.publish.license if recipe.publish else None
    metadata = ModelCardData(
        license=license,
        library_name="peft" if manifest.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=manifest.base.name if manifest.base else None,
        datasets=manifest.data.datasets or None,
        tags=[method_tag(recipe), "trl", *(["lora"] if recipe.lora else [])],
        model_name=address.subfolder,
        eval_results=model_index(run.evaluation, manifest) or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        address=address,
        tag=tag,
        agreements=[
            (FORMS.get(form) or cell(form), asked, same) for form, asked, same in agreements
        ],
        summary=summary(manifest),
        facts=[*made_of(manifest, license), *lora_fact(recipe)],
        loading=loading(address, manifest.kind, manifest.base),
        asking=asking(recipe, run.tokenizer, question),
        question=shlex.quote(question if question.isprintable() else "QUESTION"),
        training=[(name, cell(str(v))) for name, v in training_table(recipe, manifest)],
        evaluation=run.evaluation,
        scores=score_rows(run.evaluation),
        has_plot="loss.png" in files,
        gguf=next((name for name in files if name.endswith(".gguf")), None),
        kind=manifest.kind,
        script=recipe.script,
        samples="\n".join(f"#{part}" for part in sample_parts(read_samples(run.path))),
        versions=", ".join(cell(f"{name} {version}") for name, version in made_with(manifest)),
    )
    return str(card)


# What it was made of


def summary(manifest: Manifest) -> str:
    """One sentence, and whether the training was finished."""
    method, result = METHODS[manifest.kind]
    preferences = preferences_of(kind_of(manifest.recipe), manifest.recipe.get("training", {}))
    how = f"{preferences or ('fine-tuned' if manifest.base else 'trained')}{method}"
    data = ", ".join(map(code_cell, manifest.data.path))
    began = base_link(manifest.base)
    if adapter := manifest.recipe["model"].get("adapter"):
        began += f" with the adapter {code_cell(adapter)}"
    text = f"{began}, {how} on {data}.{result}"
    return text if manifest.finished else f"{text} **The training was not finished.**"


def method_tag(recipe: Recipe) -> str:
    return "dpo" if isinstance(recipe, PreferenceRecipe) else "sft"


def preferences_of(kind: type[Recipe], training: dict[str, Any]) -> str:
    """How a model was tuned on preferences; nothing for one that was not."""
    if not issubclass(kind, PreferenceRecipe):
        return ""
    fields = PreferenceTraining.model_fields
    beta, losses = (training.get(name, fields[name].default) for name in ("beta", "loss_type"))
    named = losses if isinstance(losses, list) else [losses]
    return f"preference-tuned with DPO (beta {beta}, loss {cell(' + '.join(map(str, named)))})"


def base_link(base: BaseModelSource | None) -> str:
    """The base model in Markdown, with a link if it is on the Hub."""
    if base is None:
        return "A model of random weights"
    if base.name is None:
        return "A model from a folder that is not on the Hub"
    name = f"{base.name}/{base.subfolder}" if base.subfolder else base.name
    return hub_link(name, base.name)


def is_repo(name: str) -> bool:
    """Whether it can be the name of a model or data set on the Hub."""
    return bool(re.fullmatch(f"{REPO}|{OLD_NAME}", name))


def hub_link(text: str, repo: str, kind: Literal["", "datasets/"] = "") -> str:
    """A link to a repository of the Hub; only the text where that is not the name of one."""
    if not is_repo(repo):
        return cell(text)
    return f"[{cell(text)}](https://huggingface.co/{kind}{repo})"


def made_of(manifest: Manifest, license: str | None) -> list[tuple[str, str]]:
    """Base model and data, each with its licence, and the licence of the weights."""
    base = manifest.base
    found = [("base model", base_link(base))]
    if base and base.name:
        commit = code_cell(base.revision) if base.revision else "not known"
        found.append(("base model's commit", commit))
        found.append(("base model's licence", stated_licence(base.name, "model")))
    for path in dict.fromkeys(manifest.data.path):
        if path in manifest.data.datasets:
            found.append(("data", hub_link(path, path, "datasets/")))
            found.append(("data's licence", stated_licence(path, "dataset")))
        else:
            found += [("data", code_cell(path)), ("data's licence", "not stated")]
    return [*found, ("licence of these weights", cell(license or "not stated; those above bind"))]


def stated_licence(name: str, kind: str) -> str:
    """What the Hub's page of a model or data set states."""

    def ask() -> Any:
        return getattr(HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT), "card_data", None)

    try:
        data = with_retries(ask, name)
    except TryAgain:
        raise
    except UserError:  # private or gone
        data = None
    stated = (data.get("license_name") or data.get("license")) if data else None
    stated = stated if isinstance(stated, list) else [stated or "not stated"]
    # A licence has a short identifier; what else stands there is not for our card to repeat.
    is_known = all(isinstance(name, str) and re.fullmatch(LICENCE, name) for name in stated)
    return ", ".join(stated) if is_known else "see its page"


def lora_fact(recipe: Recipe) -> list[tuple[str, str]]:
    """Rank, alpha and modules of the adapter; nothing for full weights."""
    if not recipe.lora:
        return []
    targets = recipe.lora.target_modules
    modules = ", ".join(targets) if isinstance(targets, list) else targets
    where = modules or "its default modules"
    return [("LoRA", f"r {recipe.lora.r}, alpha {recipe.lora.lora_alpha}, on {cell(where)}")]


# How it is used


def loading(address: Address, kind: str, base: BaseModelSource | None) -> str:
    """The code that loads it, in the libraries' own calls."""
    place = f'"{address.repo}", subfolder="{address.subfolder}"'
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if kind == "adapter" and base:
        named = {"subfolder": base.subfolder, "revision": base.revision}
        names = [text_of(base.name), *(f"{key}={text_of(v)}" for key, v in named.items() if v)]
        lines = ["from peft import PeftModel", *lines]
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({', '.join(names)})")
        lines.append(f"model = PeftModel.from_pretrained(base, {place})")
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({place})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({place})")
    return "\n".join(lines)


def text_of(value: str | None) -> str:
    """A string in Python, whatever is in it."""
    return printable(json.dumps(value, ensure_ascii=False))


def asking(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", question: str) -> str:
    """The code that asks it a question with the prompt it was trained with."""
    template = load_template(recipe.data, tokenizer)
    segments = template.render_prompt([{"role": "user", "content": question}])
    prompt = "".join(segment.text for segment in segments)
    given = recipe.generation.model_dump(exclude_unset=True, exclude={"prompts", "seed"})
    settings = {"max_new_tokens": recipe.generation.max_new_tokens, **given}
    if template.end_marks != [tokenizer.eos_token]:  # all that the model's own settings may know
        settings = {"eos_token_id": tokenizer.convert_tokens_to_ids(template.end_marks), **settings}
    newline = f".replace({recipe.data.newline!r}, '\\n')" if recipe.data.newline else ""
    arguments = printable(", ".join(f"{name}={value!r}" for name, value in settings.items()))
    return "\n".join(
        [
            f"prompt = {text_of(prompt)}",
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
            f"output = model.generate(**inputs, {arguments})",
            "response = output[0, inputs.input_ids.shape[1] :]",
            "answer = tokenizer.decode(response, skip_special_tokens=True)",
            f"print(answer{newline})",
        ]
    )


# How it was trained


def training_table(recipe: Recipe, manifest: Manifest) -> list[tuple[str, Any]]:
    """(name, value) of what decided the training."""
    training, tokens = recipe.training, recipe.data.batch_tokens
    steps, losses = training.max_steps or -1, manifest.losses
    step = step_size(recipe, manifest.processes or 1)
    is_dpo = isinstance(recipe, PreferenceRecipe)
    evaluated = f"{losses.before:.3f} before, {losses.after:.3f} after" if losses else None
    rows = [
        ("length", f"{steps} steps" if steps > 0 else f"{training.num_train_epochs} epochs"),
        ("tokens of a micro-batch at most", tokens)
        if tokens
        else ("examples of a micro-batch", step.micro_batch),
        ("micro-batches of a step", step.accumulation),
        ("processes", manifest.processes),
        ("learning rate", f"{training.learning_rate}, {training.lr_scheduler_type or 'linear'}"),
        ("tokens of an example at most", recipe.data.max_length),
        ("loss on", "pairs of responses" if is_dpo else LOSS_ON[recipe.data.loss_on]),
        ("adapter that training began with", recipe.model.adapter),
        ("loss of the evaluation set", evaluated or "not evaluated"),
    ]
    return [(name, value) for name, value in rows if value is not None]


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


def made_with(manifest: Manifest) -> list[tuple[str, str]]:
    """(name, version) of Python, the libraries and this code."""
    versions = {"python": manifest.python, **manifest.versions, "finetuning-recipes": manifest.git}
    return [(name, version) for name, version in versions.items() if version]
