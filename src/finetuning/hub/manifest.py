"""manifest.json: reading and writing it."""

import json
from typing import Any

NAME = "manifest.json"


MADE_BY = "finetuning-recipes"  # tells our manifests from other people's files of that name


REQUIRED = {
    "kind",
    "base",
    "data",
    "losses",
    "finished",
    "versions",
    "recipe",
    "files",
}  # what is read from one


Manifest = dict[str, Any]


def as_text(manifest: Manifest) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def parse_manifest(text: str | bytes) -> Manifest | None:
    """The manifest, or None if that is no manifest of ours."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    is_ours = (
        isinstance(found, dict) and found.get("made_by") == MADE_BY and found.keys() >= REQUIRED
    )
    return found if is_ours else None
