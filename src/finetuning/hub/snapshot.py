"""A published model on this machine: what was pulled, told in a few lines or copied to a folder."""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from finetuning.errors import UserError
from finetuning.hub.address import Address
from finetuning.hub.manifest import NAME, Manifest
from finetuning.untrusted_text import printable


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
    """files that were damaged and fetched again"""
    refused: list[str]
    """files left on the Hub: pickles, code, and whatever else is not part of a model"""


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
        lines.append(f"damaged in transfer, fetched again: {', '.join(snapshot.repaired)}")
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
