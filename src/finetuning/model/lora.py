"""peft's settings, and whether the model has the modules they name."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError, did_you_mean, is_out_of_memory, one_line
from finetuning.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel
    from trl import SFTConfig


def lora_config(recipe: Recipe) -> "LoraConfig | None":
    """What peft needs to put an adapter on the base model, or None for full fine-tuning."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump(exclude_unset=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {one_line(error)}") from None


def load_adapter(base: "PreTrainedModel", folder: Path, **settings: Any) -> "PeftModel":
    """The base model with the folder's adapter on it; settings are peft's.

    Raises UserError for whatever peft says to an adapter_config.json, which may be a stranger's.
    """
    from peft import PeftModel

    try:
        adapted: PeftModel = PeftModel.from_pretrained(base, str(folder), **settings)
        return adapted
    except Exception as error:  # of many kinds
        if is_out_of_memory(error):
            raise
        said = one_line(error) or type(error).__name__
        raise UserError(f"{folder}: the adapter cannot be loaded: {said}") from None


def add_adapter(
    model: "PreTrainedModel",
    config: "LoraConfig | None",
    args: "SFTConfig",
    begun: Path | None = None,
) -> "PreTrainedModel | PeftModel":
    """The model under a new adapter, or the one in the folder `begun`; as it is without a config.

    The adapter's weights are float32, whatever the base model's are: fp16's gradient scaler fails
    on others, and a checkpoint gives bfloat16 ones back as float32, so that a resumed run would not
    be exact (1.4e-3 in the weights).
    """
    if config is None:
        return model
    from peft import get_peft_model
    from transformers import set_seed

    from finetuning.model.lora_sum import sum_in_place

    set_seed(args.seed)  # peft draws the adapter's weights
    is_zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    # ZeRO-3 gathers small weights into one buffer of one dtype (deepspeedai/DeepSpeed#8072).
    settings: dict[str, Any] = {"autocast_adapter_dtype": not is_zero3}
    if begun:
        adapted = load_adapter(model, begun, is_trainable=True, **settings)
    else:
        adapted = get_peft_model(model, config, **settings)
    sum_in_place(adapted)
    if args.activation_checkpointing:
        # Trainer does so itself, but not for a peft model (huggingface/transformers#42489).
        adapted.enable_input_require_grads()
        if is_zero3:  # else backward finds weights that are not gathered (huggingface/trl#2514)
            given: Any = args.activation_checkpointing_kwargs or {}
            args.activation_checkpointing_kwargs = {**given, "use_reentrant": True}
    return adapted


def loraplus_optimizer(
    model: "PeftModel", args: "SFTConfig", ratio: float
) -> "torch.optim.Optimizer":
    """peft's optimizer for LoRA+ (https://arxiv.org/abs/2402.12354), with the settings of training:
    matrices B learn `ratio` times as fast as matrices A."""
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=args.weight_decay, **settings
    )
    return optimizer


def require_modules(model: "PreTrainedModel", lora: dict[str, Any]) -> None:
    """Raises UserError for a listed name that no module has.

    peft silently leaves it out if it finds another one. Not for a mixture of experts: peft still
    takes the names that experts had before they became one parameter.
    """
    if any(len(shape_of(weight)) == 3 for weight in model.parameters()):
        return
    modules = dict(model.named_modules())
    own = {path.rpartition(".")[2] for path, module in modules.items() if hasattr(module, "weight")}
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = lora.get(field)
        for name in names if isinstance(names, list) else ():
            if any(f".{path}".endswith(f".{name}") for path in modules):
                continue
            hint = did_you_mean(name, own) or f"; it has {', '.join(sorted(own))}"
            raise UserError(
                f"lora.{field}: no module of the {model.config.model_type} model is called "
                f"{name}{hint}"
            )


def shape_of(weight: "torch.Tensor") -> tuple[int, ...]:
    """(out, in), or (experts, out, in) for a mixture; of a weight that ZeRO-3 has sharded, too."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
