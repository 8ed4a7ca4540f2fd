"""Recipe, config and batch -> the memory of one training step: the step itself, on fake tensors.

Model, adapter, attention and loss are those of training, so that only what happens inside of a
kernel is estimated. torch's FakeTensorMode gives a tensor shape, number format and device, but no
bytes. Every storage that comes and goes is recorded, and the peak is looked up afterwards, for
whatever share of it a process holds.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from finetuning.budget.gpu_stand_ins import (
    PaddedPacking,
    gpu_kernels,
    quantize_linear_layers,
)
from finetuning.data.batching import Batch
from finetuning.model.loading import fuse_gelu
from finetuning.model.lora import lora_config
from finetuning.model.packed_models import use_packed_attention
from finetuning.model.packing import Packing, packed_as
from finetuning.model.precision import torch_dtype
from finetuning.model.response_head import ResponseHead, Targets, require_plain_head
from finetuning.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KINDS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits")
# Bytes that an optimizer keeps per byte of trained weights; of others, AdamW's two averages.
OPTIMIZER_SHARES = {
    "sgd": 0.0,
    "adafactor": 0.01,
    "adamw_8bit": 0.5,
    "adamw_bnb_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
}


@dataclass(frozen=True)
class StepMemory:
    """What one step allocates, in order."""

    kinds: np.ndarray
    """(storages,) index into KINDS"""
    sizes: np.ndarray
    """(storages,) bytes"""
    events: np.ndarray
    """(events,) n where storage number n is allocated, ~n (negative) where it is freed"""
    operations: int
    """that compute something, about as many as a GPU launches kernels"""

    def peak(self, shares: dict[str, float] | None = None) -> dict[str, int]:
        """{kind: bytes} at the moment when their sum is largest.

        `shares` says which part of a kind a process holds, 0..1; where a kind is not in it, all.
        """
        share = np.array([(shares or {}).get(kind, 1.0) for kind in KINDS])
        storages = np.where(self.events < 0, ~self.events, self.events)
        bytes_held = self.sizes[storages] * share[self.kinds[storages]]
        change = np.where(self.events < 0, -bytes_held, bytes_held)
        until = int(np.cumsum(change).argmax()) + 1
        kinds, change = self.kinds[storages[:until]], change[:until]
        return {kind: round(change[kinds == index].sum()) for index, kind in enumerate(KINDS)}


def meta_model(recipe: Recipe, config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model as make_trainer has it, its weights on the meta device.

    Raises UserError where make_trainer does.
    """
    dtype = torch_dtype(recipe.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
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

        model = get_peft_model(model, adapter)
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
        head.tie_again()
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
    if head.tied is not None:
        trained = [weight for weight in trained if weight is not head.head.weight]
    with tracker.tagging("optimizer"):
        state = torch.empty(optimizer_bytes(recipe, trained), dtype=torch.uint8)
    if recipe.training.gradient_accumulation_steps > 1:
        for weight in trained:
            weight.grad = torch.empty_like(weight)
    is_half, is_packed = autocast is not None, "position_ids" in batch
    # Its kernel takes examples one by one, but no bias.
    has_flash = is_half and model.config.model_type != "bloom" and (capability or (0, 0)) >= (8, 0)
    kind = Packing if capability is None or has_flash else PaddedPacking
    packing = kind(tuple(batch["lengths"]), batch["position_ids"]) if is_packed else None
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


class StorageTracker(TorchDispatchMode):
    """Records every storage that an operation allocates, and when it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Numbers of the storages that are alive.
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.kinds: list[str] = []
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.kind = "activations"
        """of what is allocated now"""
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.number_of(tensor)
        return output

    def number_of(self, tensor: torch.Tensor) -> int:
        """The number of the tensor's storage, which is recorded when it is first seen."""
        storage = tensor.untyped_storage()
        if storage not in self.numbers:
            number = self.numbers[storage] = len(self.sizes)
            self.kinds.append(self.kind)
            self.sizes.append(storage.nbytes())
            self.events.append(number)
            weakref.finalize(storage, self.events.append, ~number)
        return self.numbers[storage]

    def tag(self, tensor: torch.Tensor, kind: str) -> None:
        """Sets the kind of a tensor's storage, which may have been allocated before."""
        self.kinds[self.number_of(tensor)] = kind

    @contextmanager
    def tagging(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def step_memory(self) -> StepMemory:
        kinds = np.array([KINDS.index(kind) for kind in self.kinds])
        sizes, events = np.array(self.sizes, np.int64), np.array(self.events, np.int64)
        return StepMemory(kinds, sizes, events, self.operations)


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
    """Tags what the loss allocates as logits, and the gradients it leaves behind as activations.

    Autograd adds the two gradients of a tied weight in place, but not on fake tensors, where it
    would make a third. So the head has a weight of its own meanwhile, in the same memory.
    """

    def __init__(self, model: "PreTrainedModel", tracker: StorageTracker) -> None:
        super().__init__(model)
        self.tracker = tracker
        embeddings: Any = model.get_input_embeddings()
        self.tied = self.head.weight if self.head.weight is embeddings.weight else None
        if self.tied is not None:
            self.head.weight = torch.nn.Parameter(self.tied.detach(), self.tied.requires_grad)

    def tie_again(self) -> None:
        if self.tied is not None:
            self.head.weight = self.tied

    def forward(self, head: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        first = len(self.tracker.sizes)
        with self.tracker.tagging("logits"):
            loss = super().forward(head, hidden_states)
        for number in self.tracker.numbers.values():
            if number >= first:
                self.tracker.kinds[number] = "activations"
        return loss
