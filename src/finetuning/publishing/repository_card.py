"""README.md of the repository: what people wrote, and a table of all models published there."""

import urllib.parse

from huggingface_hub import ModelCard

from finetuning.errors import UserError, one_line
from finetuning.hub.manifest import Manifest
from finetuning.publishing.card_facts import base_link, is_repo
from finetuning.untrusted_text import cell, code_cell

# Around the table, in every repository that was published to: they stay as they are.
BEGIN = "<!-- checkpoints: src/publish.py writes what follows -->"
END = "<!-- end of checkpoints -->"

MAX_SOURCES = 10  # named in the table
METHODS = {"full": "all weights", "adapter": "LoRA adapter", "merged": "LoRA, merged"}


def repository_card(repo: str, before: bytes | None, manifests: dict[str, Manifest]) -> str:
    """The repository's README.md with the table of its models; the rest of `before` is kept.

    `manifests` is {subfolder: manifest}. The Hub reads metadata from this file only, so it names
    all base models and data sets. Raises UserError where `before` cannot be read.
    """
    try:
        card = ModelCard(
            before.decode() if before else f"---\npipeline_tag: text-generation\n---\n\n# {repo}\n"
        )
    except Exception as error:  # yaml's and huggingface_hub's own
        raise UserError(
            f"{repo}: the metadata of its README.md cannot be read: {one_line(error)}; fix it there"
        ) from None
    # A model may be trained on one that was published here: the repository is not its own base.
    known = [manifest.base.name for manifest in manifests.values() if manifest.base]
    bases = [name for name in known if name and name != repo and is_repo(name)]
    datasets = [name for manifest in manifests.values() for name in manifest.data.datasets]
    add_to_metadata(card, "base_model", bases)
    add_to_metadata(card, "datasets", [name for name in datasets if is_repo(name)])
    above, _, rest = card.text.partition(BEGIN)
    below = rest.partition(END)[2] or "\n"
    table = model_table(repo, manifests)
    whole = f"{table}\n\n{loading_code(repo)}"
    card.text = f"{above.rstrip()}\n\n{BEGIN}\n\n{whole}\n\n{END}{below}"
    return str(card)


def loading_code(repo: str) -> str:
    """How a model of the table is loaded, in Markdown; an adapter's own card says how that is."""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, folder = "{repo}", "..."  # a folder of the table
model = AutoModelForCausalLM.from_pretrained(repo, subfolder=folder)
tokenizer = AutoTokenizer.from_pretrained(repo, subfolder=folder)
```

Every folder's own `README.md` shows how it is asked, and how an adapter is loaded on its base."""


def add_to_metadata(card: ModelCard, key: str, names: list[str]) -> None:
    """Adds the names to a list of the card's metadata, sorted and once each."""
    before = card.data.get(key) or []
    before = [before] if isinstance(before, str) else before
    setattr(card.data, key, sorted({*before, *names}) or None)


def model_table(repo: str, manifests: dict[str, Manifest]) -> str:
    """One row for each published model, in Markdown."""
    rows = ["| folder | trained | base model | data | evaluation loss |", "|---|---|---|---|---|"]
    for subfolder, manifest in sorted(manifests.items()):
        losses = manifest.losses
        loss = f"{losses.before:.3f} → {losses.after:.3f}" if losses else ""
        place = urllib.parse.quote(f"{repo}/tree/main/{subfolder}")
        link = f"[{cell(subfolder)}](https://huggingface.co/{place})"
        data = ", ".join(map(code_cell, manifest.data.path[:MAX_SOURCES]))
        method = METHODS[manifest.kind]
        rows.append(f"| {link} | {method} | {base_link(manifest.base)} | {data} | {loss} |")
    return "\n".join(rows)
