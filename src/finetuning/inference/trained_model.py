"""The trained model of a run folder, loaded to be asked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from finetuning.data.chosen_template import load_template
from finetuning.inference.generation import Asker
from finetuning.inference.resolve import pin_base_model
from finetuning.model.loading import load_model
from finetuning.model.lora import load_adapter
from finetuning.model.tokenizer import read_tokenizer
from finetuning.recipe.recipe import Recipe
from finetuning.recipe.sections import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_asker(folder: Path, recipe: Recipe, weights: Path | None = None) -> Asker:
    """The model of a run folder, to be asked. Uses a GPU if there is one.

    `weights` is where its weights are, if that is another folder.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = read_tokenizer(str(folder))
    model: Any = load_trained(weights or folder, recipe, tokenizer, device)
    return Asker(
        model.to(device), tokenizer, load_template(recipe.data, tokenizer), recipe.generation
    )


def load_trained(
    folder: Path, recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", device: str = "cpu"
) -> "PreTrainedModel":
    """The run folder's weights, or its adapter on the base model it was trained on.

    The base is quantized if the recipe's is.
    """
    if not (folder / "adapter_config.json").exists():
        return load_model(Model(name=str(folder), dtype=recipe.model.dtype), tokenizer, seed=0)
    # A base from scratch is the same only with the seed of training.
    base = load_model(pin_base_model(recipe).model, tokenizer, recipe.training.seed, device)
    return cast("PreTrainedModel", load_adapter(base, folder))
