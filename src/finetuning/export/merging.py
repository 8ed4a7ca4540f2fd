"""An adapter and its base model -> full weights."""

from pathlib import Path

from finetuning.data.chosen_template import load_template
from finetuning.inference.generation import Asker, saved_generation_config
from finetuning.inference.resolve import pin_base_model
from finetuning.model.loading import load_model
from finetuning.model.location import location
from finetuning.model.lora import load_adapter
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Model
from finetuning.runs.folder import RunFolder


def merge(run: RunFolder, recipe: Recipe, target: Path) -> Path:
    """Writes the run's adapter, merged into its base model, to the target.

    With the generation settings of the recipe and the tokens that end its answers, as full weights
    have them.

    The base is loaded plain and in the number format it is stored in: merged into an 8-bit or 4-bit
    base, answers change by what quantization rounds off (2e-2 to 4e-1, measured); in another
    format, files change their size.
    """
    model = pin_base_model(recipe).model
    plain = model.model_copy(update={"quantization": None, "dtype": stored_dtype(model)})
    base = load_model(plain, run.tokenizer, recipe.training.seed)
    merged = load_adapter(base, run.path).merge_and_unload()
    template = load_template(recipe.data, run.tokenizer)
    asker = Asker(merged, run.tokenizer, template, recipe.generation)
    merged.generation_config = saved_generation_config(asker)
    merged.save_pretrained(target)
    return target


def stored_dtype(model: Model) -> str:
    """In which the base model's weights are stored; for a model from scratch, model.dtype."""
    if model.from_scratch:
        return model.dtype
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        location(model), revision=model.revision, trust_remote_code=False
    )
    stored = config.dtype
    return model.dtype if stored is None else str(stored).removeprefix("torch.")
