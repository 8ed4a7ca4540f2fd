"""Which settings need less memory."""

from finetuning.launch.step_size import smaller
from finetuning.recipe.recipe import Recipe


def remedies(recipe: Recipe, micro_batch: int, accumulation: int) -> list[str]:
    """Settings that need less memory, those that change the least of the training first."""
    found = []
    if recipe.data.batch_tokens:
        found.append(f"a data.batch_tokens below {recipe.data.batch_tokens}")
    elif micro_batch > 1:
        micro_batch, accumulation = smaller(micro_batch, accumulation)
        setting = f"training.per_device_train_batch_size={micro_batch}"
        if not recipe.training.global_batch_size:  # accumulation follows from it
            setting += f" training.gradient_accumulation_steps={accumulation}"
        found.append(setting)
    if not recipe.training.activation_checkpointing:
        found.append("training.activation_checkpointing=true")
    if recipe.lora and recipe.model.quantization != "4bit" and not recipe.model.from_scratch:
        found.append(f"model.quantization={'4bit' if recipe.model.quantization else '8bit'}")
    found.append(f"a data.max_length below {recipe.data.max_length}")
    return found if recipe.lora else [*found, "a lora section"]
