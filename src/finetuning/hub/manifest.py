"""manifest.json: what a published model was made of, and the sha256 of its files."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

NAME = "manifest.json"
# Tells our manifests from other people's files of that name.
MADE_BY: Literal["finetuning-recipes"] = "finetuning-recipes"

Kind = Literal["full", "adapter", "merged"]


class Part(BaseModel):
    """A frozen part of a manifest. Keys of later versions are passed over."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="ignore",
        ser_json_inf_nan="constants",  # a loss may be NaN; null would say that there is none
        use_attribute_docstrings=True,
    )


class BaseModelSource(Part):
    """The model that training began with."""

    name: str | None
    """Hub id; None for a local folder"""
    subfolder: str | None
    revision: str | None


class TrainingData(Part):
    path: list[str]
    """of every source, as the recipe names it"""
    datasets: list[str]
    """those of them that are on the Hub"""
    fingerprint: str | None
    """of the examples; None in old manifests"""


class Losses(Part):
    """Of the evaluation set."""

    before: float
    after: float


class PublishedFile(Part):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    """bytes"""


class Manifest(Part):
    """manifest.json, as publishing writes it and pulling verifies it."""

    made_by: Literal["finetuning-recipes"] = MADE_BY
    kind: Kind
    base: BaseModelSource | None
    """None for a model from scratch"""
    data: TrainingData
    losses: Losses | None
    git: str | None = None
    python: str | None = None
    versions: dict[str, str | None]
    processes: int | None = None
    started: str | None = None
    finished: str | None
    recipe: dict[str, Any]
    files: dict[str, PublishedFile]
    """by path relative to the published folder; the manifest itself is not among them"""

    def as_text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def parse_manifest(text: str | bytes) -> Manifest | None:
    """The manifest, or None if that is not a manifest of ours."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        return None
