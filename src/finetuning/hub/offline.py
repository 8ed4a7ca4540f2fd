"""What an earlier pull left in the cache, as HF_HUB_OFFLINE=1 asks for."""

import sys
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RevisionResolutionError
from huggingface_hub.file_download import repo_folder_name

from finetuning.errors import UserError
from finetuning.hub.address import Address
from finetuning.hub.checksums import UNVERIFIED, verify
from finetuning.hub.manifest import NAME, parse_manifest
from finetuning.hub.snapshot import Snapshot
from finetuning.untrusted_text import printable


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
