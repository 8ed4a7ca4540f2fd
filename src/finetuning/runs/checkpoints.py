"""Checkpoints that can be trusted: written aside, sealed with the hash of every file, put in place
whole.

.unfinished/checkpoint-20   being written; after a kill it is thrown away
checkpoint-20/sealed.json   {file: {bytes, sha256}}; without it, or where a file differs, it is not
used
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetuning.files import sha256_of
from finetuning.model.finite import non_finite_weight

UNFINISHED = ".unfinished"
SEAL = "sealed.json"
RECOVER = (
    "the command that trained it writes the weights anew from its last checkpoint; without one, "
    "src/pull.py has what was published, else train again in another training.output_dir"
)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_of(folder: Path) -> list[Path]:
    """Every checkpoint, trustworthy or not, the newest first."""
    found = [
        path for path in folder.glob("checkpoint-*/") if path.name.rpartition("-")[2].isdecimal()
    ]
    return sorted(found, key=step_of, reverse=True)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)


def clear_unfinished(folder: Path) -> Path:
    """An empty place to write a checkpoint aside; what a killed run left half written or half
    removed is gone.
    """
    for left in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    (folder / UNFINISHED).mkdir()
    return folder / UNFINISHED


def seal_and_rotate(
    written: Path, folder: Path, limit: int | None, best_step: int | None = None
) -> None:
    """Seals what was written aside and puts it in place; then, and only then, removes those beyond
    the limit.

    The newest and the best are never removed.
    """
    seal(written)
    final = folder / written.name
    remove(final)  # a damaged one of the same step
    written.rename(final)
    written.parent.rmdir()
    sync(folder)
    protected = [
        path for path in checkpoints_of(folder) if step_of(path) in (step_of(final), best_step)
    ]
    others = [path for path in checkpoints_of(folder) if path not in protected]
    for checkpoint in others[max(0, limit - len(protected)) :] if limit else []:
        remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Renamed first: a kill while removing leaves nothing that looks like a checkpoint."""
    if checkpoint.exists():
        removed = checkpoint.with_name(f"{UNFINISHED}-{checkpoint.name}")
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def move_into(written: Path, folder: Path) -> None:
    """Every file of `written` renamed into the folder, replacing what has its name."""
    for path in sorted(written.iterdir()):
        path.replace(folder / path.name)
    written.rmdir()


def seal(checkpoint: Path) -> None:
    files = files_of(checkpoint)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(digest, files))
    contents = {
        str(file.relative_to(checkpoint)): {"bytes": file.stat().st_size, "sha256": sha256}
        for file, sha256 in zip(files, hashes, strict=True)
    }
    (checkpoint / SEAL).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    for path in (checkpoint / SEAL, *checkpoint.glob("**/")):
        sync(path)


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as half a sentence, or None. Reads every file."""
    if not (checkpoint / SEAL).is_file():
        return "it was not written to its end"
    sealed = sealed_files(checkpoint)
    if sealed is None:
        return f"{SEAL} is damaged"
    return wrong_size(checkpoint, sealed) or wrong_content(checkpoint, sealed)


def size_damage(folder: Path) -> str | None:
    """What is missing of a run folder's model, or has another size than it was written with.

    None where that cannot be told: a run that was finished before its files were sealed.
    """
    if not is_sealed(folder):
        return None
    sealed = sealed_files(folder)
    if not sealed:
        return f"{SEAL} is damaged (where it is removed, files are used unchecked)"
    return wrong_size(folder, sealed)


def content_damage(folder: Path) -> str | None:
    """As size_damage, with the hash of every file."""
    damage = size_damage(folder)
    sealed = sealed_files(folder)
    return damage or (wrong_content(folder, sealed) if sealed else None)


def is_sealed(folder: Path) -> bool:
    """Whether it has a seal, one that cannot be read too."""
    return os.path.lexists(folder / SEAL)


def sealed_files(folder: Path) -> dict[str, tuple[int, str]] | None:
    """{name: (bytes, SHA-256)}; None without a seal that can be read."""
    try:
        contents = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in contents.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a flipped bit can make it other JSON


def wrong_size(folder: Path, sealed: dict[str, tuple[int, str]]) -> str | None:
    for name, (size, _) in sealed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def wrong_content(folder: Path, sealed: dict[str, tuple[int, str]]) -> str | None:
    with ThreadPoolExecutor() as pool:
        found = pool.map(digest, [folder / name for name in sealed])
        for name, sha256 in zip(sealed, found, strict=True):
            if sha256 != sealed[name][1]:
                return f"{name} is not what was written"
    return None


def verify_newest_first(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """(checkpoint, what is wrong with it) from the newest on, until one is whole."""
    for checkpoint in checkpoints_of(folder):
        damage = damage_of(checkpoint) or owner_of_code(checkpoint) or non_finite(checkpoint)
        yield checkpoint, damage
        if damage is None:
            return


def non_finite(checkpoint: Path) -> str | None:
    """That a weight is no number, as runs of earlier versions could save it.

    None where weights are not in files of safetensors, as those of FSDP and ZeRO-3.
    """
    from safetensors import SafetensorError

    try:
        found = non_finite_weight(checkpoint)
    except SafetensorError:  # it is what was written; loading it says more
        return None
    return f"{found[1]} in {found[0]} is not finite" if found else None


def owner_of_code(checkpoint: Path) -> str | None:
    """What keeps a checkpoint of DeepSpeed or FSDP from being read: it has pickles, which are code.

    DeepSpeed loads its files with weights_only=False, torch the .metadata of a sharded checkpoint
    with pickle, both from subfolders; sealed.json is written by the one who gives them.
    """
    for file in checkpoint.glob("*/**/*"):
        if file.is_symlink() or file.stat().st_uid != os.getuid():
            return f"{file.name} belongs to another user, and would be run as code"
    return None


def digest(file: Path) -> str:
    """SHA-256 of a file whose bytes are on the disk by then, not only in memory."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256_of(file)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
