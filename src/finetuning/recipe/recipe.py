"""YAML (and `section.key=value` overrides) -> Recipe: typed, frozen, every key checked."""

import io
import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError, model_validator
from ruamel.yaml import YAML

from finetuning.data.preferences import PREFERENCE_READERS
from finetuning.data.section import Data
from finetuning.errors import UserError
from finetuning.recipe.error_messages import explain, shown
from finetuning.recipe.overrides import apply_override
from finetuning.recipe.sections import (
    Evaluation,
    Generation,
    Lora,
    Model,
    PreferenceTraining,
    Publish,
    Training,
)
from finetuning.recipe.yaml_file import read_yaml
from finetuning.section import Section


class Recipe(Section):
    """One training run."""

    script: ClassVar[str] = "src/sft.py"
    """that trains it"""
    rows: ClassVar[str] = "conversations"
    """what its rows are read into"""

    model: Model
    """the base model"""
    data: Data
    """what is trained on"""
    lora: Lora | None = None
    """train an adapter of this shape instead of all weights"""
    training: Training
    """how it is trained"""
    generation: Generation = Generation()
    """how it is asked"""
    evaluation: Evaluation = Evaluation()
    """how its answers are scored"""
    publish: Publish | None = None
    """where it belongs on the Hub"""

    @model_validator(mode="after")
    def check_template(self) -> "Recipe":
        if self.model.from_scratch and self.data.template == "chat":
            raise ValueError(
                "data.template: chat needs a base model's tokenizer, model.from_scratch has no "
                "chat template"
            )
        return self

    @model_validator(mode="after")
    def check_eval(self) -> "Recipe":
        if self.training.eval_strategy != "no" and self.data.eval is None:
            raise ValueError(
                "training.eval_strategy is set, but data.eval is null: there is no evaluation set"
            )
        if self.training.early_stopping_patience and self.training.eval_strategy == "no":
            raise ValueError(
                "training.early_stopping_patience counts evaluations, but there are none: set "
                "training.eval_strategy: steps or epoch"
            )
        return self

    @model_validator(mode="after")
    def check_step(self) -> "Recipe":
        if self.training.global_batch_size is None:
            return self
        if "gradient_accumulation_steps" in self.training.model_fields_set:
            raise ValueError(
                "training.gradient_accumulation_steps follows from training.global_batch_size; "
                "leave one of them out"
            )
        if self.data.batch_tokens:
            raise ValueError(
                "training.global_batch_size counts examples, data.batch_tokens tokens; leave one "
                "out"
            )
        return self

    @model_validator(mode="after")
    def check_publish(self) -> "Recipe":
        if self.publish and self.publish.merged and self.lora is None:
            raise ValueError(
                "publish.merged is for a recipe with a lora section; this one trains full weights "
                "anyway"
            )
        return self

    @model_validator(mode="after")
    def check_micro_batch(self) -> "Recipe":
        if self.training.auto_find_batch_size and self.data.batch_tokens:
            raise ValueError(
                "training.auto_find_batch_size makes micro-batches of fewer examples, "
                "data.batch_tokens counts tokens; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def check_loraplus(self) -> "Recipe":
        if self.training.loraplus_lr_ratio is None:
            return self
        if self.lora is None:
            raise ValueError(
                "training.loraplus_lr_ratio is about the matrices of an adapter: add a lora "
                "section, or leave it out"
            )
        if self.training.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"training.loraplus_lr_ratio was not tested with optim {self.training.optim}; use "
                "adamw_torch or adamw_torch_fused"
            )
        return self

    @model_validator(mode="after")
    def check_quantization(self) -> "Recipe":
        if self.model.quantization and self.lora is None:
            raise ValueError(
                f"model.quantization: {self.model.quantization} weights cannot be trained, only an "
                "adapter on them: "
                "add a lora section, or leave quantization out"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values: those that say what a model is with their defaults, the
        others as far as they were given."""
        own = self.model_dump(include={"model", "data", "publish"})
        sparse = {"lora", "training", "generation", "evaluation"}
        given = self.model_dump(include=sparse, exclude_unset=True)
        if isinstance(self.data.path, list):
            own["data"]["path"] = [
                source.model_dump(exclude_unset=True) for source in self.data.path
            ]
        found = {**own, **given}
        return {name: found[name] for name in Recipe.model_fields if name in found}

    def as_yaml(self) -> str:
        stream = io.StringIO()
        writer = YAML(typ="safe", pure=True)
        writer.default_flow_style = False
        writer.allow_unicode = True
        # Annotated only by its default, None.
        writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        # ruamel breaks a text with tabs at a space, and reads it back with one more.
        writer.width = 2**31
        writer.dump(self.resolved(), stream)
        return stream.getvalue()


class PreferenceRecipe(Recipe):
    """One training run on pairs of responses."""

    script: ClassVar[str] = "src/dpo.py"
    rows: ClassVar[str] = "pairs of responses"

    training: PreferenceTraining
    """how it is trained"""


def kind_of(settings: Any) -> type[Recipe]:
    """What settings are a recipe of: pairs where a reader of its data section reads pairs."""
    data = settings.get("data") if isinstance(settings, dict) else None
    path = data.get("path") if isinstance(data, dict) else None
    sources = [data, *path] if isinstance(path, list) else [data]
    readers = [source.get("reader") for source in sources if isinstance(source, dict)]
    # A reader may be anything yet, a list that has no hash among others.
    reads_pairs = any(reader in list(PREFERENCE_READERS) for reader in readers)
    return PreferenceRecipe if reads_pairs else Recipe


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in the file with `section.key=value` overrides applied in order.

    Raises UserError with the place, what was found, what is allowed and the nearest valid name.
    """
    settings, places = read_yaml(Path(path))
    if not isinstance(settings, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of {', '.join(Recipe.model_fields)}, found "
            f"{shown(settings)}"
        )
    for override in overrides:
        apply_override(settings, places, override, Recipe.model_fields)
    kind = kind_of(settings)
    try:
        json.dumps(settings, ensure_ascii=False, default=str, skipkeys=True).encode()
        return kind.model_validate(settings)
    except UnicodeEncodeError:
        raise UserError(
            f"{path}: a text in it has half a character, \\ud800 to \\udfff; write the whole one"
        ) from None
    except ValidationError as error:
        raise UserError(explain(error, kind.model_fields, settings, places, str(path))) from None
