"""peft's settings, and whether the model has the modules they name."""

import difflib
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError, one_line
from finetuning.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel


def lora_config(recipe: Recipe) -> "LoraConfig | None":
    """What peft needs to put an adapter on the base model, or None for full fine-tuning."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump(exclude_unset=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {one_line(error)}") from None


def require_modules(model: "PreTrainedModel", lora: dict[str, Any]) -> None:
    """Raises UserError for a listed name that no module has: peft leaves it out in silence if it finds another one.

    Not for a mixture of experts: peft still takes the names that they had before they became one parameter.
    """
    if any(len(shape_of(weight)) == 3 for weight in model.parameters()):
        return
    modules = dict(model.named_modules())
    for field in ("target_modules", "exclude_modules"):
        listed = lora.get(field)
        for name in listed if isinstance(listed, list) else ():
            if not any(f".{module}".endswith(f".{name}") for module in modules):
                own = {
                    module.rpartition(".")[2]
                    for module, found in modules.items()
                    if hasattr(found, "weight")
                }
                near = difflib.get_close_matches(name, sorted(own), n=1, cutoff=0.0)[0]
                kind = model.config.model_type
                raise UserError(
                    f"lora.{field}: no module of the {kind} model is called {name}; did you mean {near}?"
                )


def shape_of(weight: "torch.Tensor") -> tuple[int, ...]:
    """(out, in), or (experts, out, in) for a mixture; of what ZeRO-3 has shared out, too, whose shell is empty."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
