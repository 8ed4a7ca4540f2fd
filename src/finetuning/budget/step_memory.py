"""Recipe, config and batch -> the memory of one training step: the step itself, on fake tensors.

Model, adapter, attention and loss are those of training, so that only what happens inside of a
kernel is estimated. torch's FakeTensorMode gives a tensor shape, number format and device, but no
bytes; storage_tracker.py records every storage that comes and goes.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from finetuning.budget.gpu_stand_ins import (
    PaddedPacking,
    gpu_kernels,
    quantize_linear_layers,
)
from finetuning.budget.storage_tracker import StepMemory, StorageTracker
from finetuning.data.collator import Batch
from finetuning.model.loading import fuse_gelu
from finetuning.model.lora import lora_config
from finetuning.model.packed_models import use_packed_attention
from finetuning.model.packing import Packing, packed_as
from finetuning.model.precision import torch_dtype
from finetuning.model.response_head import ResponseHead, Targets, require_plain_head
from finetuning.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Bytes that an optimizer keeps per byte of trained weights; of others, AdamW's two averages.
OPTIMIZER_SHARES = {
    "sgd": 0.0,
    "adafactor": 0.01,
    "adamw_8bit": 0.5,
    "adamw_bnb_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
}


def meta_model(recipe: Recipe, config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model as make_trainer has it, its weights on the meta device.

    Raises UserError where make_trainer does.
    """
    dtype = torch_dtype(recipe.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.get_input_embeddings().padding_idx = None  # as load_model does
        prepared: PreTrainedModel = as_trained(recipe, model)
    return prepared


def as_trained(recipe: Recipe, model: Any) -> Any:
    """The model with what make_trainer and trl change of it: attention, adapter, checkpointing."""
    require_plain_head(model, recipe.lora)
    fuse_gelu(model)
    if recipe.data.layout == "packed":
        use_packed_attention(model)
    if recipe.model.quantization:
        quantize_linear_layers(model, bits=int(recipe.model.quantization[0]))
    if adapter := lora_config(recipe):
        from peft import get_peft_model

        from finetuning.model.lora_sum import sum_in_place

        model = get_peft_model(model, adapter)
        sum_in_place(model)
    if recipe.training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if recipe.lora:
            model.enable_input_require_grads()
    return model.train()


def optimizer_bytes(recipe: Recipe, trained: Sequence[torch.Tensor]) -> int:
    share = OPTIMIZER_SHARES.get(recipe.training.optim, 2.0)
    return round(share * sum(weight.nbytes for weight in trained))


def measure_step(
    recipe: Recipe,
    model: "PreTrainedModel",
    batch: Batch,
    autocast: torch.dtype | None,
    capability: tuple[int, int] | None,
) -> StepMemory:
    """What a training step of a model by `meta_model` allocates.

    `autocast` is the format of training.bf16 or fp16, `capability` that of the GPU, None on a CPU.
    """
    tracker = StorageTracker()
    with FakeTensorMode() as mode:
        make_weights_fake(model, tracker)
        head = TrackedHead(model, tracker)
        with tracker:
            tensors = {
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            run_step(recipe, model, head, tensors, autocast, capability)
    return tracker.step_memory()


def run_step(
    recipe: Recipe,
    model: "PreTrainedModel",
    head: "TrackedHead",
    batch: Batch,
    autocast: torch.dtype | None,
    capability: tuple[int, int] | None,
) -> None:
    """Computes a micro-batch as a later step does.

    The optimizer has its averages by then, and with accumulation there are gradients to add to.
    """
    tracker = head.tracker
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with tracker.tagging("optimizer"):
        state = torch.empty(optimizer_bytes(recipe, trained), dtype=torch.uint8)
    if recipe.training.gradient_accumulation_steps > 1:
        for weight in trained:
            weight.grad = torch.empty_like(weight)
    is_half = autocast is not None
    packing = packing_of(batch, model, is_half, capability)
    arguments = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    targets = Targets(batch["positions"], batch["targets"])
    kernels = nullcontext() if capability is None else gpu_kernels(is_half)
    with packed_as(packing), kernels:
        with head.scoring(targets), torch.autocast("cpu", autocast, enabled=is_half):
            loss = model(**arguments, use_cache=False).logits
        loss.backward()
    for weight in trained:
        if weight.grad is not None:
            tracker.tag(weight.grad, "gradients")
    del state


def packing_of(
    batch: Batch, model: "PreTrainedModel", is_half: bool, capability: tuple[int, int] | None
) -> Packing | None:
    """How the device attends to the batch; None for padded rows."""
    # Its kernel takes examples one by one, but no bias.
    has_flash = is_half and model.config.model_type != "bloom" and (capability or (0, 0)) >= (8, 0)
    kind = Packing if capability is None or has_flash else PaddedPacking
    return kind.of(batch)


def make_weights_fake(model: "PreTrainedModel", tracker: StorageTracker) -> None:
    """Replaces every weight by a fake tensor, the same one wherever a weight is shared."""
    trained = "adapters" if hasattr(model, "peft_config") else "weights"
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = fake
                    tracker.tag(fake, trained if tensor.requires_grad else "weights")
                tensors[name] = fakes[id(tensor)]


class TrackedHead(ResponseHead):
    """Tags what the loss allocates as logits, and the gradients it leaves behind as activations."""

    def __init__(self, model: "PreTrainedModel", tracker: StorageTracker) -> None:
        super().__init__(model)
        self.tracker = tracker

    def forward(self, head: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        first = len(self.tracker.sizes)
        with self.tracker.tagging("logits"):
            loss = super().forward(head, hidden_states)
        for number in self.tracker.numbers.values():
            if number >= first:
                self.tracker.kinds[number] = "activations"
        return loss
