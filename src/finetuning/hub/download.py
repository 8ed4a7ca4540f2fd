"""Published model -> local folder: of one commit, verified by the Hub's and the manifest's
checksums.

The commit is resolved first and by the Hub: the libraries silently answer from the cache where the
Hub is down or the token was revoked. HF_HUB_OFFLINE=1 is the way to say that the cache is wanted.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from finetuning.errors import TryAgain, UserError
from finetuning.hub import allowed_files
from finetuning.hub.address import Address
from finetuning.hub.checksums import verify, verifying
from finetuning.hub.client import download_file, head_commit, is_intact, list_files, with_retries
from finetuning.hub.manifest import NAME
from finetuning.hub.offline import snapshot_in_cache
from finetuning.hub.snapshot import Snapshot

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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
    """(folder of the commit, paths that were damaged and fetched again).

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
