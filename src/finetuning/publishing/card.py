"""README.md of a published checkpoint, and of the repository that holds them all."""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from finetuning.data.prepare import load_template
from finetuning.errors import TryAgain, UserError, one_line
from finetuning.hub.address import Address
from finetuning.hub.client import TIMEOUT, patiently
from finetuning.hub.manifest import Manifest
from finetuning.launch.step_size import step_size
from finetuning.model.tokenizer import read_tokenizer
from finetuning.recipe.recipe import Recipe

TEMPLATE = Path(__file__).with_name("model_card.md")


BEGIN, END = (
    "<!-- checkpoints: src/publish.py writes what follows -->",
    "<!-- end of checkpoints -->",
)


METHODS = {"full": "all weights", "adapter": "LoRA adapter", "merged": "LoRA, merged"}


QUESTION = "What is the capital of Japan?"  # shown where the recipe asks none


def model_card(
    address: Address, manifest: Manifest, recipe: Recipe, folder: Path, has_plot: bool
) -> str:
    """The card of one subfolder, from its run folder; `recipe` is the one that is published."""
    question = (recipe.generation.prompts or [QUESTION])[0]
    samples = folder / "samples.md"
    metadata = ModelCardData(
        license=recipe.publish.license,
        library_name="peft" if manifest["kind"] == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=(manifest["base"] or {}).get("name"),
        datasets=manifest["data"]["datasets"] or None,
        tags=["sft", "trl", *(["lora"] if recipe.lora else [])],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        address=address,
        summary=summary(manifest),
        facts=facts(manifest, recipe),
        loading=loading(address, manifest),
        asking=asking(recipe, folder, question),
        question=shlex.quote(question),
        training=training_table(manifest, recipe),
        has_plot=has_plot,
        samples=without_title(samples.read_text(encoding="utf-8")) if samples.exists() else "",
        versions=", ".join(f"{name} {version}" for name, version in made_with(manifest)),
    )
    return str(card)


def summary(manifest: Manifest) -> str:
    """One sentence, and what a reader has to know."""
    method = {
        "full": "",
        "adapter": " with LoRA (an adapter)",
        "merged": " with LoRA, merged into full weights",
    }
    how = f"{'fine-tuned' if manifest['base'] else 'trained'}{method[manifest['kind']]}"
    text = f"{base_text(manifest)}, {how} on {', '.join(manifest['data']['path'])}."
    return text if manifest["finished"] else f"{text} **The training was not finished.**"


def base_text(manifest: Manifest) -> str:
    base = manifest["base"]
    if base is None:
        return "A model of random weights"
    if base["name"] is None:
        return "A model from a folder that is not on the Hub"
    name = base["name"] + (f"/{base['subfolder']}" if base["subfolder"] else "")
    return f"[{name}](https://huggingface.co/{base['name']})"


def facts(manifest: Manifest, recipe: Recipe) -> list[tuple[str, str]]:
    """What it was made of, and under which licences."""
    base = manifest["base"] or {}
    found = [("base model", base_text(manifest))]
    if base.get("name"):
        found.append(
            ("base model's commit", f"`{base['revision']}`" if base["revision"] else "not known")
        )
        found.append(("base model's licence", licence(base["name"], "model")))
    for name in dict.fromkeys(manifest["data"]["path"]):
        is_published = name in manifest["data"]["datasets"]
        found.append(
            (
                "data",
                f"[{name}](https://huggingface.co/datasets/{name})"
                if is_published
                else f"`{name}`",
            )
        )
        found.append(("data's licence", licence(name, "dataset") if is_published else "not stated"))
    found.append(
        ("licence of these weights", recipe.publish.license or "not stated; those above bind")
    )
    if recipe.lora:
        targets = recipe.lora.target_modules
        where = ", ".join(targets) if isinstance(targets, list) else targets
        found.append(
            (
                "LoRA",
                f"r {recipe.lora.r}, alpha {recipe.lora.lora_alpha}, on {where or 'its default modules'}",
            )
        )
    return found


def licence(name: str, kind: str) -> str:
    """What the Hub's page of a model or data set states."""
    try:
        data = patiently(
            lambda: HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT), name
        ).card_data
    except TryAgain:
        raise
    except UserError:  # private or gone
        data = None
    stated = (data.get("license_name") or data.get("license")) if data else None
    return ", ".join(stated) if isinstance(stated, list) else stated or "not stated"


def loading(address: Address, manifest: Manifest) -> str:
    """The code that loads it, in the libraries' own calls."""
    place = f'"{address.repo}", subfolder="{address.subfolder}"'
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if manifest["kind"] == "adapter":
        base = manifest["base"]
        names = [f'"{base["name"]}"']
        names += [f'{key}="{base[key]}"' for key in ("subfolder", "revision") if base[key]]
        lines = ["from peft import PeftModel", *lines]
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({', '.join(names)})")
        lines.append(f"model = PeftModel.from_pretrained(base, {place})")
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({place})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({place})")
    return "\n".join(lines)


def asking(recipe: Recipe, folder: Path, question: str) -> str:
    """The code that asks it a question with the prompt of its training."""
    tokenizer = read_tokenizer(str(folder))
    template = load_template(recipe.data, tokenizer)
    prompt = "".join(
        segment.text for segment in template.render_prompt([{"role": "user", "content": question}])
    )
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
            "answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)",
            f"print(answer{newline})",
        ]
    )


def training_table(manifest: Manifest, recipe: Recipe) -> list[tuple[str, Any]]:
    training, tokens, losses = recipe.training, recipe.data.batch_tokens, manifest["losses"]
    steps = training.max_steps or -1
    step = step_size(recipe, manifest["processes"] or 1)
    rows = [
        ("length", f"{steps} steps" if steps > 0 else f"{training.num_train_epochs} epochs"),
        ("tokens of a micro-batch at most", tokens)
        if tokens
        else ("examples of a micro-batch", step.micro_batch),
        ("micro-batches of a step", step.accumulation),
        ("processes", manifest["processes"]),
        ("learning rate", f"{training.learning_rate}, {training.lr_scheduler_type or 'linear'}"),
        ("tokens of an example at most", recipe.data.max_length),
        ("loss on", "responses" if recipe.data.loss_on == "response" else "all tokens"),
        (
            "held-out loss",
            f"{losses['before']:.3f} before, {losses['after']:.3f} after"
            if losses
            else "not evaluated",
        ),
    ]
    return [(name, value) for name, value in rows if value is not None]


def made_with(manifest: Manifest) -> list[tuple[str, str]]:
    versions = {
        "python": manifest["python"],
        **manifest["versions"],
        "finetuning-recipes": manifest["git"],
    }
    return [(name, version) for name, version in versions.items() if version]


def without_title(samples: str) -> str:
    """The questions one level deeper, below the card's own heading."""
    body = samples.partition("\n")[2].strip()
    return (
        body.replace("\n## ", "\n### ").replace("## ", "### ", 1)
        if body.startswith("## ")
        else body
    )


def repository_card(repo: str, before: bytes | None, manifests: dict[str, Manifest]) -> str:
    """The repository's README.md with the table of all its checkpoints; what else stands there is kept.

    The Hub reads metadata from this file only, so it names all base models and data sets. Raises UserError where the
    README that is there cannot be read.
    """
    try:
        card = ModelCard(
            before.decode() if before else f"---\npipeline_tag: text-generation\n---\n\n# {repo}\n"
        )
    except Exception as error:  # yaml's and huggingface_hub's own
        problem = one_line(error)
        raise UserError(
            f"{repo}: the metadata of its README.md cannot be read: {problem}; mend it there"
        ) from None
    bases = [(manifest["base"] or {}).get("name") for manifest in manifests.values()]
    paths = [path for manifest in manifests.values() for path in manifest["data"]["datasets"]]
    card.data.base_model = sorted({*listed(card.data.base_model), *filter(None, bases)}) or None
    card.data.datasets = sorted({*listed(card.data.datasets), *paths}) or None
    above, _, rest = card.text.partition(BEGIN)
    below = rest.partition(END)[2]
    card.text = f"{above.rstrip()}\n\n{BEGIN}\n\n{checkpoint_table(repo, manifests)}\n\n{END}{below or chr(10)}"
    return str(card)


def listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def checkpoint_table(repo: str, manifests: dict[str, Manifest]) -> str:
    rows = ["| folder | trained | base model | data | held-out loss |", "|---|---|---|---|---|"]
    for subfolder, manifest in sorted(manifests.items()):
        losses = manifest["losses"]
        loss = f"{losses['before']:.3f} → {losses['after']:.3f}" if losses else ""
        link = f"[{subfolder}](https://huggingface.co/{repo}/tree/main/{subfolder})"
        data = ", ".join(f"`{path}`" for path in manifest["data"]["path"])
        rows.append(
            f"| {link} | {METHODS[manifest['kind']]} | {base_text(manifest)} | {data} | {loss} |"
        )
    return "\n".join(rows)
