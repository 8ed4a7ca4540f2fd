"""What a model card says of a model: what it was made of, under which licences, how trained."""

import re
from typing import Any, Literal

from huggingface_hub import HfApi

from finetuning.errors import TryAgain, UserError
from finetuning.hub.address import REPO
from finetuning.hub.client import TIMEOUT, with_retries
from finetuning.hub.manifest import BaseModelSource, Manifest
from finetuning.launch.step_size import step_size
from finetuning.recipe.recipe import PreferenceRecipe, Recipe, kind_of
from finetuning.recipe.sections import PreferenceTraining
from finetuning.untrusted_text import cell, code_cell

LICENCE = r"[\w.-]{1,40}|not stated"
OLD_NAME = r"^[\w.-]{1,96}$"  # of the Hub's first models, such as gpt2, without an owner
# (behind "fine-tuned", behind what it was trained on)
METHODS = {
    "full": ("", ""),
    "adapter": (" with LoRA", " An adapter."),
    "merged": (" with LoRA", " The adapter is merged into full weights."),
}
LOSS_ON = {
    "response": "responses",
    "last_response": "the last response of a conversation",
    "all": "all tokens",
}


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


def made_with(manifest: Manifest) -> list[tuple[str, str]]:
    """(name, version) of Python, the libraries and this code."""
    versions = {"python": manifest.python, **manifest.versions, "finetuning-recipes": manifest.git}
    return [(name, version) for name, version in versions.items() if version]
