"""YAML (and `section.key=value` overrides) -> Recipe: typed, frozen, every key checked."""

import io
import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from finetuning.data.preferences import PREFERENCE_READERS
from finetuning.data.section import Data
from finetuning.errors import UserError, did_you_mean, one_line
from finetuning.recipe.error_messages import KeyPath, explain, is_inside, owner_of, shown
from finetuning.recipe.ownership import OWNED, RENAMED
from finetuning.recipe.plain_yaml import parse_plain
from finetuning.recipe.sections import (
    Evaluation,
    Generation,
    Lora,
    Model,
    PreferenceTraining,
    Publish,
    Training,
)
from finetuning.section import Section

SCHEMA = Path(__file__).parents[3] / "recipes" / "recipe.schema.json"


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
        return {
            name: {**own, **given}.get(name)
            for name in Recipe.model_fields
            if name in {**own, **given}
        }

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


def recipe_schema() -> str:
    """JSON schema of a recipe, for completion and checking in editors.

    It also has the keys that a section does not take, with what the command line says to them.
    """
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
    }
    schema["$defs"] |= PreferenceRecipe.model_json_schema()["$defs"]
    for section, owned in OWNED.items():
        kinds = [section.capitalize(), *(["PreferenceTraining"] if section == "training" else [])]
        for properties in (schema["$defs"][kind]["properties"] for kind in kinds):
            for name, owner in owned.items():
                properties.setdefault(name, refused(f"{section}.{name} belongs to {owner}"))
            for name, new in RENAMED.items():
                properties.setdefault(name, refused(f"{name} has a new name: write {new}"))
    schema |= training_by_reader(schema["properties"].pop("training"))
    del schema["additionalProperties"]  # which does not know what stands below `then` and `else`
    exclusive = {"Model": ("name", "from_scratch"), "Eval": ("every", "fraction", "split")}
    for section, names in exclusive.items():
        schema["$defs"][section]["oneOf"] = [given(name) for name in names]
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def training_by_reader(training: dict[str, Any]) -> dict[str, Any]:
    """Which keys `training` has, in the schema: those of pairs where the reader reads pairs."""
    reads_pairs = {
        "required": ["reader"],
        "properties": {"reader": {"enum": [*PREFERENCE_READERS]}},
    }
    in_list = {
        "required": ["path"],
        "properties": {"path": {"type": "array", "contains": reads_pairs}},
    }
    of_pairs = {**training, "$ref": "#/$defs/PreferenceTraining"}
    return {
        "if": {"properties": {"data": {"anyOf": [reads_pairs, in_list]}}},
        "then": {"properties": {"training": of_pairs}},
        "else": {"properties": {"training": training}},
        "unevaluatedProperties": False,
    }


def refused(message: str) -> dict[str, Any]:
    """A key that may not be there; editors of the YAML language server show the message."""
    shown = dict.fromkeys(("description", "errorMessage", "deprecationMessage"), message)
    return {"not": {}, "deprecated": True, "doNotSuggest": True, **shown}


def given(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in the file with `section.key=value` overrides applied in order.

    Raises UserError with the place, what was found, what is allowed and the nearest valid name.
    """
    settings, places = read_yaml(Path(path))
    for override in overrides:
        apply_override(settings, places, override)
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


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The file's settings, and for each of them `file:line`.

    YAML 1.2: `2e-5` is a number, `no` is text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe{similar_recipe(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a recipe is a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text, a recipe is a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        settings, lines = parse_plain(text, str(path))
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    except DuplicateKeyError as error:
        raise UserError(
            f"{path}:{error.problem_mark.line + 1}: {error.problem.split(' with')[0]}"
        ) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: is not YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    except ValueError as error:  # a date or a number that Python does not read
        raise UserError(f"{path}: is not a recipe: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of {', '.join(Recipe.model_fields)}, found "
            f"{shown(settings)}"
        )
    return settings, {key: f"{path}:{line}" for key, line in lines.items()}


def similar_recipe(path: Path) -> str:
    return did_you_mean(str(path), [str(other) for other in path.parent.glob("*.yaml")])


def apply_override(settings: dict[str, Any], places: dict[KeyPath, str], override: str) -> None:
    """Sets one `section.key=value` in place; the value is read as YAML."""
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys) or (len(keys) < 2 and name not in Recipe.model_fields):
        raise UserError(
            f"override {override!r}: expected section.key=value{with_section(name, text)}"
        )
    try:
        value, _ = parse_plain(text, f"override {name}")
    except YAMLError as error:
        raise UserError(
            f"override {override!r}: the value is not YAML: {getattr(error, 'problem', error)}"
        ) from None
    inner = settings
    for depth, key in enumerate(keys[:-1]):
        if inner.get(key) is None:
            inner[key] = {}
            places[tuple(keys[: depth + 1])] = f"override {override!r}"
        inner = inner[key]
        if not isinstance(inner, dict):
            raise UserError(
                f"override {override!r}: {'.'.join(keys[: depth + 1])} is {shown(inner)}, it has "
                "no keys"
            )
    inner[keys[-1]] = value
    for replaced in [key for key in places if is_inside(key, tuple(keys))]:
        del places[replaced]
    places[tuple(keys)] = f"override {override!r}"


def with_section(name: str, text: str) -> str:
    """What an override without a section may have meant."""
    owner = owner_of(Recipe.model_fields, name)
    if owner:
        return f"; did you mean {owner}.{name}={text}?"
    return ", such as training.max_steps=10 or training.learning_rate=1e-4"


if __name__ == "__main__":  # make schema
    SCHEMA.write_text(recipe_schema(), encoding="utf-8")
