"""Published checkpoint -> local folder: of one commit, every byte compared with what the Hub and the manifest say.

The commit is resolved first and by the Hub: the libraries answer from the cache, without a word, where the Hub is down
or the token was revoked. HF_HUB_OFFLINE=1 is the way to say that the cache is wanted.
"""

import shutil
import sys
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
from finetuning.hub import allowed_files as contents
from finetuning.hub.address import Address
from finetuning.hub.client import TIMEOUT, fetch, is_intact, patiently, sha256, tree_of
from finetuning.hub.manifest import NAME, Manifest, parse_manifest

UNVERIFIED = {NAME, "README.md"}  # a card may be edited on the Hub


class Snapshot(NamedTuple):
    """A checkpoint on this machine, verified."""

    address: Address
    """with the commit as its revision"""
    folder: Path
    names: list[str]
    """of its files, relative to the folder"""
    manifest: Manifest | None
    """None for a checkpoint that was not published from here: then only the Hub's own checksums were compared"""
    repaired: list[str]
    """files that arrived damaged and were fetched again"""
    refused: list[str]
    """files left on the Hub: pickles, code, and whatever else belongs to no checkpoint"""


def pull(address: Address, cache: Path | None = None) -> Snapshot:
    """The checkpoint, downloaded to the Hugging Face cache, or to the folder given.

    Raises UserError where there is none, or none that is whole and safe; TryAgain where the Hub does not answer.
    """
    if constants.is_offline_mode():
        return take_from_cache(address)
    api, repo, revision = HfApi(), address.repo, address.revision or "main"
    commit = patiently(lambda: api.repo_info(repo, revision=revision, timeout=TIMEOUT).sha, repo)
    entries = patiently(lambda: tree_of(repo, commit), repo)
    wanted, refused = split_files(address, entries)
    root = download(repo, commit, wanted, cache)
    repaired = [path for path in progress(wanted) if not is_intact(root / path, entries[path])]
    if repaired:
        root = download(repo, commit, repaired, cache, force=True)
        if still := [path for path in repaired if not is_intact(root / path, entries[path])]:
            raise TryAgain(
                f"{address}: {still[0]} arrived damaged twice; give the same command again"
            )
    names, damaged = names_in(address, wanted), names_in(address, repaired)
    known = {
        name: entries[path].lfs.sha256
        for name, path in zip(names, wanted, strict=True)
        if entries[path].lfs
    }
    pinned = address._replace(revision=commit)
    snapshot = Snapshot(
        pinned, *checked(pinned, root / address.subfolder, names, known), damaged, refused
    )
    if cache is None:
        with suppress(HfHubHTTPError, RevisionResolutionError):
            api.resolve_revision(
                repo, revision=revision
            )  # notes it in the cache, for HF_HUB_OFFLINE=1
    return snapshot


def split_files(address: Address, entries: dict[str, RepoFile]) -> tuple[list[str], list[str]]:
    """(paths that belong to the checkpoint, names of its other files)."""
    there = [path for path in entries if path.startswith(f"{address.subfolder}/")]
    names = names_in(address, there)
    wanted = [
        path for path, name in zip(there, names, strict=True) if contents.is_publishable(name)
    ]
    refused = [name for name in names if not contents.is_publishable(name)]
    if not any(path.endswith(".safetensors") for path in wanted):
        pickles = [name for name in refused if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        found = f"; {pickles[0]} is a pickle, which can run code, and is refused" if pickles else ""
        others = ", ".join(
            path.removesuffix(f"/{NAME}") for path in entries if path.endswith(f"/{NAME}")
        )
        hint = f"; checkpoints there: {others}" if others else ""
        raise UserError(f"{address.repo} has no safetensors in {address.subfolder}{found}{hint}")
    return wanted, refused


def names_in(address: Address, paths: list[str]) -> list[str]:
    return [path.removeprefix(f"{address.subfolder}/") for path in paths]


def download(
    repo: str, commit: str, paths: list[str], cache: Path | None, force: bool = False
) -> Path:
    """The folder of the commit. What arrived whole before an attempt broke off is not fetched again.

    One file after the other: the threads of snapshot_download finish their files before they heed Ctrl-C.
    """
    for path in tqdm(paths, desc="files", unit="file", leave=False, delay=1):
        file = patiently(partial(fetch, repo, path, commit, cache, force), repo)
    return file.parents[path.count("/")]


def progress(paths: list[str]) -> tqdm:
    return tqdm(paths, desc="verifying", unit="file", leave=False, delay=1)


def take_from_cache(address: Address) -> Snapshot:
    """What an earlier pull left, as HF_HUB_OFFLINE asks for; compared with its manifest."""
    pinned = address._replace(revision=cached_commit(address))
    folder = cached_folder(pinned)
    manifest = parse_manifest((folder / NAME).read_bytes()) if (folder / NAME).is_file() else None
    if manifest is None:
        raise UserError(
            f"{address} is not in the cache, or without a manifest to verify it; HF_HUB_OFFLINE is set"
        )
    print(f"from the cache: {pinned}", file=sys.stderr)
    names = [
        name
        for name in (*manifest["files"], NAME)
        if name not in UNVERIFIED or (folder / name).is_file()
    ]
    return Snapshot(pinned, *checked(pinned, folder, names, {}), [], [])


def cached_commit(address: Address) -> str:
    """The newest that is known of the repository; if its folder was not pulled, the one that was pulled last."""
    snapshots, subfolder, revision = snapshots_of(address.repo), address.subfolder, address.revision
    with suppress(RevisionResolutionError):
        known = (
            HfApi()
            .resolve_revision(address.repo, revision=revision, local_files_only=True)
            .resolved
        )
        if revision or (snapshots / known / subfolder).is_dir():
            return known
    pulled = (
        []
        if revision
        else [commit for commit in snapshots.glob("*") if (commit / subfolder).is_dir()]
    )
    if not pulled:
        raise UserError(f"{address} is not in the cache and HF_HUB_OFFLINE is set; pull it first")
    return max(pulled, key=lambda commit: (commit / subfolder).stat().st_mtime).name


def cached_folder(address: Address) -> Path:
    """Where the library keeps the folder of a commit."""
    return snapshots_of(address.repo) / address.revision / address.subfolder


def snapshots_of(repo: str) -> Path:
    return (
        Path(constants.HF_HUB_CACHE)
        / repo_folder_name(repo_id=repo, repo_type="model")
        / "snapshots"
    )


def checked(
    address: Address, folder: Path, names: list[str], known: dict[str, str]
) -> tuple[Path, list[str], Manifest | None]:
    """(folder, names, manifest) if it is what was published, whole, and nothing in it runs code.

    `known` has the sha256 of files that were compared with the Hub's already.
    """
    manifest = parse_manifest((folder / NAME).read_bytes()) if NAME in names else None
    published = (
        {name: entry["sha256"] for name, entry in manifest["files"].items()} if manifest else {}
    )
    for name in progress(sorted({*names, *published} - UNVERIFIED) if manifest else []):
        is_allowed = contents.is_publishable(name) and (folder / name).is_file()
        if not is_allowed or (known.get(name) or sha256(folder / name)) != published.get(name):
            raise UserError(
                f"{address}: {name} is not what was published (its sha256 is not that of {NAME}); pull a tag of it, "
                "or publish it again"
            )
    contents.require_no_remote_code(folder)
    is_adapter = (folder / contents.ADAPTER_WEIGHTS).is_file()
    contents.require_weights(folder, contents.ADAPTER if is_adapter else contents.MODEL)
    return folder, names, manifest


def describe(snapshot: Snapshot) -> list[str]:
    """What was pulled, in a few lines."""
    address, manifest = snapshot.address, snapshot.manifest
    size = sum((snapshot.folder / name).stat().st_size for name in snapshot.names)
    compared = (
        "every sha256 is that of its manifest"
        if manifest
        else "compared with the Hub's checksums; no manifest"
    )
    lines = [f"{address}", f"{len(snapshot.names)} files, {size:,} bytes: {compared}"]
    if manifest:
        base = (
            manifest["base"]["name"] or "a base that is not on the Hub"
            if manifest["base"]
            else "random weights"
        )
        lines.append(
            f"{manifest['kind']}, trained on {', '.join(manifest['data']['path'])} from {base}"
        )
    if snapshot.repaired:
        lines.append(f"arrived damaged, fetched again: {', '.join(snapshot.repaired)}")
    if snapshot.refused:
        lines.append(f"left on the Hub, no part of a checkpoint: {', '.join(snapshot.refused)}")
    return lines


def copy(snapshot: Snapshot, target: Path) -> Path:
    """The snapshot's files as a folder of its own: whole or not at all."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already; choose another folder, or delete it")
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for name in snapshot.names:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot.folder / name, unfinished / name)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target
