"""An adapter and its base model -> full weights."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuning.inference.resolve import pin_base_model
from finetuning.model.loading import load_model
from finetuning.model.location import location
from finetuning.model.tokenizer import read_tokenizer
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Model


@contextmanager
def merged_if_wanted(folder: Path, recipe: Recipe) -> Iterator[Path | None]:
    """A folder with the run's merged weights, gone when it was used; None where publish.merged is not set."""
    if not recipe.publish.merged:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merged-") as weights:
        yield merge(folder, recipe, Path(weights))


def merge(folder: Path, recipe: Recipe, target: Path) -> Path:
    """Writes the run folder's adapter, merged into its base model, to the target.

    The base is loaded plain and in the number format it is stored in: merged into an 8-bit or 4-bit base, answers move
    by what quantisation rounds off (2e-2 to 4e-1, measured); in another format, files change their size.
    """
    from peft import PeftModel

    tokenizer, model = read_tokenizer(str(folder)), pin_base_model(recipe).model
    plain = model.model_copy(update={"quantization": None, "dtype": stored_dtype(model)})
    adapted = PeftModel.from_pretrained(
        load_model(plain, tokenizer, recipe.training.seed), str(folder)
    )
    adapted.merge_and_unload().save_pretrained(target)
    return target


def stored_dtype(model: Model) -> str:
    """In which the base model's weights are stored; a model from scratch is made in model.dtype."""
    if model.from_scratch:
        return model.dtype
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(location(model), revision=model.revision).dtype
    return model.dtype if stored is None else str(stored).removeprefix("torch.")
