"""Whether a folder is what was published: every sha256, and nothing in it that runs code."""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from finetuning.errors import UserError
from finetuning.files import sha256_of
from finetuning.hub import allowed_files
from finetuning.hub.address import Address
from finetuning.hub.manifest import NAME, Manifest, parse_manifest
from finetuning.untrusted_text import TOO_SLOW, short_line, slow_patterns

UNVERIFIED = {NAME, "README.md"}  # the manifest itself; a card may be edited on the Hub


def verifying(names: list[str]) -> Iterable[str]:
    """The names, with a progress bar if they take longer than a second."""
    bar: Iterable[str] = tqdm(names, desc="verifying", unit="file", leave=False, delay=1)
    return bar


def verify(
    address: Address, folder: Path, names: list[str], known: dict[str, str]
) -> Manifest | None:
    """The manifest, if the folder is what was published, whole, and nothing in it runs code.

    `known` has the sha256 of files that were compared with the Hub's already. Raises UserError.
    """
    manifest = parse_manifest((folder / NAME).read_bytes()) if NAME in names else None
    if manifest:
        verify_checksums(address, folder, names, manifest, known)
    allowed_files.require_no_remote_code(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    kind = allowed_files.ADAPTER if is_adapter else allowed_files.MODEL
    allowed_files.require_weights(folder, kind)
    # Without these, transformers and peft go to another repository, or take all memory.
    config = "adapter_config.json" if is_adapter else "config.json"
    if not (folder / config).is_file():
        raise UserError(f"{address} has no {config}")
    require_modest(folder / config)
    return manifest


def require_modest(file: Path) -> None:
    """Raises UserError for a config of a stranger that no machine could follow."""
    settings = allowed_files.read_json(file)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(settings.get(name), int) and settings[name] > allowed_files.MAX_LAYERS:
            raise UserError(
                f"{file}: {name} is {settings[name]:,}; at most {allowed_files.MAX_LAYERS:,}"
            )
    if settings.get("layer_replication"):
        raise UserError(f"{file}: layer_replication is refused")
    for name, pattern in slow_patterns(settings):
        raise UserError(f"{file}: {name} is {short_line(pattern)}, {TOO_SLOW}")


def verify_checksums(
    address: Address, folder: Path, names: list[str], manifest: Manifest, known: dict[str, str]
) -> None:
    """Raises UserError unless folder and manifest hold the same files with the same sha256."""
    expected = {name: file.sha256 for name, file in manifest.files.items()}
    for name in verifying(sorted({*names, *expected} - UNVERIFIED)):
        is_file = allowed_files.is_publishable(name) and (folder / name).is_file()
        if not is_file or (known.get(name) or sha256_of(folder / name)) != expected.get(name):
            raise UserError(
                f"{address}: {name} is not what was published (its sha256 is not the one in "
                f"{NAME}); pull a tag of it, or publish it again"
            )
