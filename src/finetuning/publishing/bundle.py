"""Run folder -> everything that will stand in the subfolder, hashed and ready to be committed.

The trip: run folder -> the recipe as others can run it -> what the model was made of -> files ->
checksums -> what answers the same (verification.py) -> card -> manifest. The folder's own files are
read once, by RunFolder.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from tqdm import tqdm

from finetuning.files import link_or_copy
from finetuning.hub import allowed_files
from finetuning.hub.address import PREFIX, Address
from finetuning.hub.client import TIMEOUT, require_access, with_retries
from finetuning.hub.manifest import NAME, BaseModelSource, Kind, Manifest, PublishedFile
from finetuning.inference.agreement import Agreement
from finetuning.publishing.card import model_card
from finetuning.publishing.portable import portable_recipe, publish_section
from finetuning.publishing.provenance import describe_run
from finetuning.publishing.publishable import (
    gguf_if_wanted,
    merged_if_wanted,
    require_publishable,
    with_model,
)
from finetuning.recipe.recipe import Recipe
from finetuning.runs.folder import RunFolder
from finetuning.runs.output_folder import lock
from finetuning.runs.plots import plot_losses

Files = dict[str, Path | bytes]  # {name in the subfolder, or path in the repository: content}
CARD = "README.md"


@dataclass(frozen=True)
class Publication:
    """What will stand in the subfolder."""

    address: Address
    manifest: Manifest
    files: dict[str, CommitOperationAdd]
    """by path in the repository"""


@dataclass(frozen=True)
class Bundle:
    """What a run publishes, before its card says under which tag, and which forms answer alike."""

    address: Address
    run: RunFolder
    recipe: Recipe
    """as others can run it"""
    manifest: Manifest
    """without files"""
    files: Files
    """without card and manifest"""
    operations: dict[str, CommitOperationAdd]
    """the same by path in the repository, hashed"""
    agreements: list[Agreement] = field(default_factory=list)
    """of every form that was asked"""

    @property
    def digest(self) -> str:
        """sha256 of the names and contents of the files."""
        files = [f"{path} {as_published(added).sha256}" for path, added in self.operations.items()]
        return hashlib.sha256("\n".join(files).encode()).hexdigest()

    def tagged(self, tag: str) -> Publication:
        """All of it, with a card that names the tag. Raises UserError where a text has a secret."""
        files = [*self.files, CARD]
        text = model_card(
            self.address, self.manifest, self.recipe, self.run, files, tag, self.agreements
        )
        card = checksummed(below(self.address, {CARD: text.encode()}))
        added = dict(sorted({**self.operations, **card}.items()))
        above = f"{self.address.subfolder}/"
        published = {path.removeprefix(above): as_published(added[path]) for path in added}
        manifest = self.manifest.model_copy(update={"files": published})
        written: Files = {NAME: manifest.as_text().encode()}
        for name, source in ((CARD, text.encode()), *written.items()):
            allowed_files.require_no_secret(name, source)
        added |= checksummed(below(self.address, written))
        return Publication(self.address, manifest, added)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A folder with the files, as a reader has it; deleted afterwards."""
        with tempfile.TemporaryDirectory(dir=self.run.path, prefix=".published-") as folder:
            for name, source in self.files.items():
                place = Path(folder, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(source, bytes):
                    place.write_bytes(source)
                else:
                    link_or_copy(source, place)
            yield Path(folder)


def below(address: Address, files: Files) -> Files:
    """The files by path in the repository, sorted."""
    return {f"{address.subfolder}/{name}": source for name, source in sorted(files.items())}


def address_of(recipe: Recipe) -> Address:
    """Where the recipe is published. Raises UserError if it does not say."""
    publish = publish_section(recipe)
    return Address(publish.repo, publish.subfolder)


@contextmanager
def gathered(folder: Path, recipe: Recipe, unfinished: bool, writes: bool) -> Iterator[Bundle]:
    """What the run publishes.

    Meanwhile nobody else writes to the run folder; merged weights and the like are deleted
    afterwards. Raises UserError where others could not use it, and where the Hub does not let us
    read its repository, or write to it.
    """
    with ExitStack() as stack:
        run = stack.enter_context(with_model(folder))
        require_publishable(run, recipe, unfinished)
        require_access(address_of(recipe).repo, write=writes)
        stack.enter_context(lock(folder))
        merged = stack.enter_context(merged_if_wanted(run, recipe))
        gguf = stack.enter_context(gguf_if_wanted(run, recipe))
        yield gather(run, recipe, merged, gguf)


def gather(run: RunFolder, recipe: Recipe, merged: Path | None, gguf: Path | None = None) -> Bundle:
    """What a run folder publishes.

    `merged` holds its merged weights and `gguf` its GGUF file, if these are wanted.

    `recipe` is the run's, with where it is published. Raises UserError where a text holds a secret.
    """
    portable = portable_recipe(recipe, run.environment.get("base_commit"))
    kind: Kind = "merged" if merged else "adapter" if recipe.lora else "full"
    manifest = describe_run(run, portable, kind)
    files = collect_files(run.path, portable, manifest.base, merged)
    if gguf:
        files |= allowed_files.matching_files(gguf, allowed_files.GGUF)
    if plot := plot_losses(run.metrics):
        files["loss.png"] = plot
    for name, source in files.items():
        allowed_files.require_no_secret(name, source)
    address = address_of(recipe)
    operations = checksummed(below(address, files))
    return Bundle(address, run, portable, manifest, files, operations)


def collect_files(
    folder: Path, recipe: Recipe, base: BaseModelSource | None, merged: Path | None
) -> Files:
    """Weights, tokenizer, records and recipe, which is the one that is published."""
    texts = (*allowed_files.TOKENIZER, *allowed_files.RUN_RECORDS)
    files: Files = {"recipe.yaml": recipe.as_yaml().encode()}
    files |= allowed_files.matching_files(folder, texts)
    if merged or not recipe.lora:
        files |= allowed_files.matching_files(merged or folder, allowed_files.MODEL)
    if recipe.lora and (not merged or publish_section(recipe).adapter):
        assert base is not None  # require_public_base
        above = f"{allowed_files.ADAPTER_FOLDER}/" if merged else ""
        adapter = dict(allowed_files.matching_files(folder, allowed_files.ADAPTER))
        files[f"{above}{allowed_files.ADAPTER_WEIGHTS}"] = adapter[allowed_files.ADAPTER_WEIGHTS]
        files[f"{above}adapter_config.json"] = adapter_config(adapter["adapter_config.json"], base)
    return files


def adapter_config(file: Path, base: BaseModelSource) -> bytes:
    """peft's settings with the base model that others have.

    peft writes down the path it was loaded from. Raises UserError where the Hub does not have it.
    """
    name = base.name or ""  # require_public_base: never a local folder's
    with_retries(lambda: HfApi().repo_info(name, revision=base.revision, timeout=TIMEOUT), name)
    settings = allowed_files.read_json(file)
    settings |= {"base_model_name_or_path": name, "revision": base.revision}
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def announcement(bundle: Bundle, is_private: bool) -> str:
    """What is about to be published, to whom, and which names of local files can be read in it."""
    manifest, address = bundle.manifest, bundle.address
    files = bundle.tagged(f"{address.tag_prefix}1").files  # of another tag they are as many
    size = sum(operation.upload_info.size for operation in files.values())
    audience = "private" if is_private else "public: everyone can read it"
    local = [path for path in manifest.data.path if path not in manifest.data.datasets]
    adapter = manifest.recipe["model"].get("adapter") or PREFIX
    local += [] if adapter.startswith(PREFIX) else [adapter]
    names = ", ".join([*local, str(manifest.recipe["training"]["output_dir"])])
    return (
        f"{address.repo} is {audience}; {len(files)} files, {size:,} bytes; "
        f"of this machine's paths they name {names}"
    )


def checksummed(files: Files) -> dict[str, CommitOperationAdd]:
    """{path in the repository: the file as an addition to a commit, its sha256 known}."""
    operations = {path: CommitOperationAdd(path, source) for path, source in files.items()}
    total = sum(operation.upload_info.size for operation in operations.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="checksums", leave=False, delay=1
    ) as bar:
        for operation in operations.values():
            # Where it is not hashed yet, asking for sha256 reads the whole file.
            bar.update(operation.upload_info.size if operation.upload_info.sha256 else 0)
    return operations


def as_published(operation: CommitOperationAdd) -> PublishedFile:
    info = operation.upload_info
    return PublishedFile(sha256=info.sha256.hex(), size=info.size)
