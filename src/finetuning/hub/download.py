"""Published model -> local folder: of one commit, verified by the Hub's and the manifest's
checksums.

The commit is resolved first and by the Hub: the libraries silently answer from the cache where the
Hub is down or the token was revoked. HF_HUB_OFFLINE=1 is the way to say that the cache is wanted.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from finetuning.errors import TryAgain, UserError
from finetuning.files import sha256_of
from finetuning.hub import allowed_files
from finetuning.hub.address import Address
from finetuning.hub.client import (
    download_file,
    head_commit,
    is_intact,
    list_files,
    with_retries,
)
from finetuning.hub.manifest import NAME, Manifest, parse_manifest
from finetuning.untrusted_text import TOO_SLOW, printable, short_line, slow_patterns

UNVERIFIED = {NAME, "README.md"}  # the manifest itself; a card may be edited on the Hub
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Snapshot(NamedTuple):
    """A published model on this machine, verified."""

    address: Address
    """with the commit as its revision"""
    folder: Path
    names: list[str]
    """of its files, relative to the folder"""
    manifest: Manifest | None
    """None where it was not published from here: then only the Hub's own checksums were compared"""
    repaired: list[str]
    """files that arrived damaged and were fetched again"""
    refused: list[str]
    """files left on the Hub: pickles, code, and whatever else is not part of a model"""


def pull(address: Address, cache: Path | None = None) -> Snapshot:
    """The published model, downloaded to the Hugging Face cache, or to the folder given.

    Raises UserError where there is none, or none that is whole and safe; TryAgain where the Hub
    does not answer.
    """
    if constants.is_offline_mode():
        return snapshot_in_cache(address)
    repo, revision = address.repo, address.revision or "main"
    commit = with_retries(lambda: head_commit(repo, revision), repo)
    listed = with_retries(lambda: list_files(repo, commit), repo)
    wanted, refused = split_files(address, listed)
    root, repaired = download_intact(address._replace(revision=commit), wanted, listed, cache)

    pinned, folder = address._replace(revision=commit), root / address.subfolder
    names = names_in(address, wanted)
    checksums = (listed[path].lfs for path in wanted)
    known = {name: lfs.sha256 for name, lfs in zip(names, checksums, strict=True) if lfs}
    manifest = verify(pinned, folder, names, known)
    if cache is None:
        with suppress(HfHubHTTPError, RevisionResolutionError):
            HfApi().resolve_revision(repo, revision=revision)  # notes it for HF_HUB_OFFLINE=1
    return Snapshot(pinned, folder, names, manifest, names_in(address, repaired), refused)


def split_files(address: Address, listed: dict[str, RepoFile]) -> tuple[list[str], list[str]]:
    """(paths that belong to the published model, names of the folder's other files).

    Raises UserError where there are no safetensors.
    """
    paths = [path for path in listed if path.startswith(f"{address.subfolder}/")]
    names = names_in(address, paths)
    is_allowed = [allowed_files.is_publishable(name) for name in names]
    wanted = [path for path, allowed in zip(paths, is_allowed, strict=True) if allowed]
    refused = [name for name, allowed in zip(names, is_allowed, strict=True) if not allowed]
    if any(path.endswith(".safetensors") for path in wanted):
        return wanted, refused
    pickles = [name for name in refused if name.endswith(PICKLES)]
    found = f"; {pickles[0]} is a pickle, which can run code, and is refused" if pickles else ""
    others = [path.removesuffix(f"/{NAME}") for path in listed if path.endswith(f"/{NAME}")]
    hint = f"; published there: {', '.join(others)}" if others else ""
    raise UserError(f"{address.repo} has no safetensors in {address.subfolder}{found}{hint}")


def names_in(address: Address, paths: list[str]) -> list[str]:
    return [path.removeprefix(f"{address.subfolder}/") for path in paths]


def download_intact(
    address: Address, paths: list[str], listed: dict[str, RepoFile], cache: Path | None
) -> tuple[Path, list[str]]:
    """(folder of the commit, paths that arrived damaged and were fetched again).

    Raises TryAgain where one is damaged a second time.
    """
    root = download(address, [listed[path] for path in paths], cache)
    damaged = [path for path in verifying(paths) if not is_intact(root / path, listed[path])]
    if not damaged:
        return root, []
    root = download(address, [listed[path] for path in damaged], cache, force=True)
    if still := [path for path in damaged if not is_intact(root / path, listed[path])]:
        raise TryAgain(
            f"{address}: {still[0]}: checksum mismatch after two downloads; "
            "run the same command again"
        )
    return root, damaged


def download(
    address: Address, entries: list[RepoFile], cache: Path | None, force: bool = False
) -> Path:
    """The folder of the commit. What an interrupted attempt has finished is not fetched again.

    One file after the other: the threads of snapshot_download finish their files before they heed
    Ctrl-C.
    """
    repo, commit = address.repo, str(address.revision)
    assert entries
    for entry in tqdm(entries, desc="files", unit="file", leave=False, delay=1):
        file: Path = with_retries(partial(download_file, repo, entry, commit, cache, force), repo)
    return file.parents[entries[-1].path.count("/")]


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


# Offline


def snapshot_in_cache(address: Address) -> Snapshot:
    """What an earlier pull left, as HF_HUB_OFFLINE asks for; compared with its manifest."""
    pinned = address._replace(revision=commit_in_cache(address))
    folder = cached_folder(pinned)
    manifest = parse_manifest((folder / NAME).read_bytes()) if (folder / NAME).is_file() else None
    if manifest is None:
        raise UserError(
            f"{address} is not in the cache, or has no manifest to verify it; HF_HUB_OFFLINE is set"
        )
    print(printable(f"from the cache: {pinned}"), file=sys.stderr)
    names = [
        name
        for name in (*manifest.files, NAME)
        if name not in UNVERIFIED or (folder / name).is_file()
    ]
    return Snapshot(pinned, folder, names, verify(pinned, folder, names, {}), [], [])


def commit_in_cache(address: Address) -> str:
    """The newest commit known of the repository, if its folder was pulled, else the last pulled."""
    repo, subfolder, revision = address
    snapshots = snapshots_of(repo)
    with suppress(RevisionResolutionError):
        known = HfApi().resolve_revision(repo, revision=revision, local_files_only=True).resolved
        if revision or (snapshots / known / subfolder).is_dir():
            return str(known)
    commits = [] if revision else list(snapshots.glob("*"))
    pulled = [commit for commit in commits if (commit / subfolder).is_dir()]
    if not pulled:
        raise UserError(f"{address} is not in the cache and HF_HUB_OFFLINE is set; pull it first")
    return max(pulled, key=lambda commit: (commit / subfolder).stat().st_mtime).name


def cached_folder(address: Address) -> Path:
    """Where the library keeps the folder of a commit."""
    assert address.revision is not None
    return snapshots_of(address.repo) / address.revision / address.subfolder


def snapshots_of(repo: str) -> Path:
    name = repo_folder_name(repo_id=repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / name / "snapshots"


# What the person is told and given


def describe_snapshot(snapshot: Snapshot) -> list[str]:
    """What was pulled, in a few lines."""
    address, manifest = snapshot.address, snapshot.manifest
    size = sum((snapshot.folder / name).stat().st_size for name in snapshot.names)
    compared = (
        f"every sha256 is the one in {NAME}"
        if manifest
        else "compared with the Hub's checksums; no manifest"
    )
    lines = [f"{address}", f"{len(snapshot.names)} files, {size:,} bytes: {compared}"]
    if manifest:
        base = manifest.base.name or "a base that is not on the Hub" if manifest.base else None
        trained = f"trained on {', '.join(manifest.data.path)} from {base or 'random weights'}"
        lines.append(f"{manifest.kind}, {trained}")
    if snapshot.repaired:
        lines.append(f"arrived damaged, fetched again: {', '.join(snapshot.repaired)}")
    if snapshot.refused:
        lines.append(f"left on the Hub, not part of a model: {', '.join(snapshot.refused)}")
    return [printable(line) for line in lines]


def copy_snapshot(snapshot: Snapshot, target: Path) -> Path:
    """The snapshot's files as a folder of its own: whole or not at all."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; choose another folder, or delete it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
        unfinished = Path(beside, target.name)
        for name in snapshot.names:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot.folder / name, unfinished / name)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    return target
