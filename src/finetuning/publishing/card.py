"""README.md of a published model."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from finetuning.data.prepare import load_template
from finetuning.errors import TryAgain, UserError
from finetuning.hub.address import Address
from finetuning.hub.client import TIMEOUT, with_retries
from finetuning.hub.manifest import BaseModelSource, Manifest
from finetuning.launch.step_size import step_size
from finetuning.recipe.recipe import Recipe
from finetuning.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = Path(__file__).with_name("model_card.md")
QUESTION = "What is the capital of Japan?"  # shown where the recipe asks none
METHODS = {
    "full": "",
    "adapter": " with LoRA (an adapter)",
    "merged": " with LoRA, merged into full weights",
}


def model_card(
    address: Address, manifest: Manifest, recipe: Recipe, run: RunFolder, has_plot: bool
) -> str:
    """The card of one subfolder; `recipe` is the one that is published."""
    question = (recipe.generation.prompts or [QUESTION])[0]
    license = recipe.publish.license if recipe.publish else None
    samples = run.path / "samples.md"
    metadata = ModelCardData(
        license=license,
        library_name="peft" if manifest.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=manifest.base.name if manifest.base else None,
        datasets=manifest.data.datasets or None,
        tags=["sft", "trl", *(["lora"] if recipe.lora else [])],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        address=address,
        summary=summary(manifest),
        facts=[*made_of(manifest, license), *lora_fact(recipe)],
        loading=loading(address, manifest.kind, manifest.base),
        asking=asking(recipe, run.tokenizer, question),
        question=shlex.quote(question),
        training=training_table(recipe, manifest),
        has_plot=has_plot,
        samples=without_title(samples.read_text(encoding="utf-8")) if samples.exists() else "",
        versions=", ".join(f"{name} {version}" for name, version in made_with(manifest)),
    )
    return str(card)


# What it was made of


def summary(manifest: Manifest) -> str:
    """One sentence, and whether the training was finished."""
    how = f"{'fine-tuned' if manifest.base else 'trained'}{METHODS[manifest.kind]}"
    text = f"{base_link(manifest.base)}, {how} on {', '.join(manifest.data.path)}."
    return text if manifest.finished else f"{text} **The training was not finished.**"


def base_link(base: BaseModelSource | None) -> str:
    """The base model in Markdown, with a link if it is on the Hub."""
    if base is None:
        return "A model of random weights"
    if base.name is None:
        return "A model from a folder that is not on the Hub"
    name = f"{base.name}/{base.subfolder}" if base.subfolder else base.name
    return f"[{name}](https://huggingface.co/{base.name})"


def made_of(manifest: Manifest, license: str | None) -> list[tuple[str, str]]:
    """Base model and data, each with its licence, and the licence of the weights."""
    base = manifest.base
    found = [("base model", base_link(base))]
    if base and base.name:
        commit = f"`{base.revision}`" if base.revision else "not known"
        found.append(("base model's commit", commit))
        found.append(("base model's licence", stated_licence(base.name, "model")))
    for path in dict.fromkeys(manifest.data.path):
        if path in manifest.data.datasets:
            found.append(("data", f"[{path}](https://huggingface.co/datasets/{path})"))
            found.append(("data's licence", stated_licence(path, "dataset")))
        else:
            found += [("data", f"`{path}`"), ("data's licence", "not stated")]
    return [*found, ("licence of these weights", license or "not stated; those above bind")]


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
    return ", ".join(stated) if isinstance(stated, list) else stated or "not stated"


def lora_fact(recipe: Recipe) -> list[tuple[str, str]]:
    """Rank, alpha and modules of the adapter; nothing for full weights."""
    if not recipe.lora:
        return []
    targets = recipe.lora.target_modules
    modules = ", ".join(targets) if isinstance(targets, list) else targets
    where = modules or "its default modules"
    return [("LoRA", f"r {recipe.lora.r}, alpha {recipe.lora.lora_alpha}, on {where}")]


# How it is used


def loading(address: Address, kind: str, base: BaseModelSource | None) -> str:
    """The code that loads it, in the libraries' own calls."""
    place = f'"{address.repo}", subfolder="{address.subfolder}"'
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if kind == "adapter" and base:
        named = {"subfolder": base.subfolder, "revision": base.revision}
        names = [f'"{base.name}"', *(f'{key}="{value}"' for key, value in named.items() if value)]
        lines = ["from peft import PeftModel", *lines]
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({', '.join(names)})")
        lines.append(f"model = PeftModel.from_pretrained(base, {place})")
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({place})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({place})")
    return "\n".join(lines)


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
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return "\n".join(
        [
            f"prompt = {json.dumps(prompt, ensure_ascii=False)}",
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
        ("loss on", "responses" if recipe.data.loss_on == "response" else "all tokens"),
        ("loss of the evaluation set", evaluated or "not evaluated"),
    ]
    return [(name, value) for name, value in rows if value is not None]


def made_with(manifest: Manifest) -> list[tuple[str, str]]:
    """(name, version) of Python, the libraries and this code."""
    versions = {"python": manifest.python, **manifest.versions, "finetuning-recipes": manifest.git}
    return [(name, version) for name, version in versions.items() if version]


def without_title(samples: str) -> str:
    """samples.md with its questions one level deeper, below the card's own heading."""
    body = samples.partition("\n")[2].strip()
    if body.startswith("## "):
        return body.replace("\n## ", "\n### ").replace("## ", "### ", 1)
    return body
