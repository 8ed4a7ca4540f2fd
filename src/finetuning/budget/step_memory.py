"""Recipe, config and batch -> the memory that one training step takes: the step itself, on tensors without memory.

Model, adapter, attention and loss are those of training, so nothing is estimated but what happens inside of a kernel.
torch's FakeTensorMode gives a tensor shape, number format and device, but no bytes. Every storage that comes and goes
is written down, and the peak is looked up afterwards, for whatever share of it a process holds.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from finetuning.budget.gpu_stand_ins import LayerNormInFloat32, PaddedPacking, hold_linear_layers
from finetuning.data.batching import Batch
from finetuning.model.attention import Packing, isolate, packed_as
from finetuning.model.loading import fuse_gelu
from finetuning.model.lora import lora_config
from finetuning.model.loss import ResponseHead, Targets, require_plain_head
from finetuning.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


KINDS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits")


# Bytes that an optimizer keeps for a byte of trained weights; where it is not listed, the two averages of AdamW.
OPTIMIZER_SHARES = {
    "sgd": 0.0,
    "adafactor": 0.01,
    "adamw_8bit": 0.5,
    "adamw_bnb_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
}


@dataclass(frozen=True)
class Footprint:
    """What one step allocates, in order."""

    kinds: np.ndarray  # (storages,) index into KINDS
    sizes: np.ndarray  # (storages,) bytes
    events: np.ndarray  # (events,) number n of a storage that comes, ~n (negative) of one that goes

    def peak(self, shares: dict[str, float] | None = None) -> dict[str, int]:
        """{kind: bytes} at the moment when they are most, all together.

        `shares` says which part of a kind a process holds, 0..1; all of it where nothing is said.
        """
        share = np.array([(shares or {}).get(kind, 1.0) for kind in KINDS])
        storages = np.where(self.events < 0, ~self.events, self.events)
        change = (
            np.where(self.events < 0, -1, 1) * self.sizes[storages] * share[self.kinds[storages]]
        )
        until = int(np.cumsum(change).argmax()) + 1
        kinds = self.kinds[storages[:until]]
        return {
            kind: round(change[:until][kinds == number].sum()) for number, kind in enumerate(KINDS)
        }


def footprint(
    recipe: Recipe,
    model: "PreTrainedModel",
    batch: Batch,
    autocast: torch.dtype | None,
    on_gpu: bool,
) -> Footprint:
    """What a training step of a model that `build` made allocates. `autocast` is that of training.bf16 or fp16."""
    tracker = StorageTracker()
    with FakeTensorMode() as mode:
        tag_weights(tracker, model)
        head = TrackedHead(model, tracker)
        with tracker:
            tensors = {
                name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                for name, v in batch.items()
            }
            step(recipe, model, head, tensors, autocast, on_gpu)
        head.tie()
    return tracker.footprint()


def build(recipe: Recipe, config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model as make_trainer has it, its weights on the meta device. Raises UserError where that refuses it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model.dtype))
        return prepare(recipe, model)


def prepare(recipe: Recipe, model: "PreTrainedModel") -> "PreTrainedModel":
    require_plain_head(model, recipe.lora)
    fuse_gelu(model)
    if recipe.data.layout == "packed":
        isolate(model)
    if recipe.model.quantization:
        hold_linear_layers(model, bits=int(recipe.model.quantization[0]))
    if recipe.lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(recipe))
    if recipe.training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if recipe.lora:
            model.enable_input_require_grads()
    return model.train()


def optimizer_bytes(recipe: Recipe, trained: list[torch.Tensor]) -> int:
    share = OPTIMIZER_SHARES.get(recipe.training.optim, 2.0)
    return round(share * sum(weight.nbytes for weight in trained))


def step(
    recipe: Recipe,
    model: "PreTrainedModel",
    head: "TrackedHead",
    batch: Batch,
    autocast: torch.dtype | None,
    on_gpu: bool,
) -> None:
    """A micro-batch of a later step: the optimizer has its averages, and gradients are there if they are added up."""
    tracker = head.tracker
    trained = [
        weight
        for weight in model.parameters()
        if weight.requires_grad and (head.tied is None or weight is not head.head.weight)
    ]
    with tracker.tagging("optimizer"):
        state = torch.empty(optimizer_bytes(recipe, trained), dtype=torch.uint8)
    if recipe.training.gradient_accumulation_steps > 1:
        for weight in trained:
            weight.grad = torch.empty_like(weight)
    kind = PaddedPacking if on_gpu else Packing
    packing = (
        kind(tuple(batch["lengths"]), torch.device("cpu")) if "position_ids" in batch else None
    )
    arguments = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    targets = Targets(batch["positions"], batch["targets"])
    with packed_as(packing), head.scoring(targets), LayerNormInFloat32(on_gpu and autocast):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**arguments, use_cache=False).logits
        loss.backward()
    for weight in trained:
        tracker.tag(weight.grad, "gradients")
    del state


class StorageTracker(TorchDispatchMode):
    """Writes down every storage that an operation allocates, and when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: weakref.WeakKeyDictionary[Any, int] = (
            weakref.WeakKeyDictionary()
        )  # of storages that are there
        self.kinds: list[str] = []
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.kind = "activations"  # of what is allocated now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.number_of(tensor)
        return output

    def number_of(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage not in self.numbers:
            number = self.numbers[storage] = len(self.sizes)
            self.kinds.append(self.kind)
            self.sizes.append(storage.nbytes())
            self.events.append(number)
            weakref.finalize(storage, self.events.append, ~number)
        return self.numbers[storage]

    def tag(self, tensor: torch.Tensor, kind: str) -> None:
        """Says of which kind a tensor's storage is, which may have been allocated before that was known."""
        self.kinds[self.number_of(tensor)] = kind

    @contextmanager
    def tagging(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def footprint(self) -> Footprint:
        kinds = np.array([KINDS.index(kind) for kind in self.kinds])
        return Footprint(kinds, np.array(self.sizes, np.int64), np.array(self.events, np.int64))


def tag_weights(tracker: StorageTracker, model: "PreTrainedModel") -> None:
    """Puts a fake tensor in the place of every weight, the same one wherever a weight has several places."""
    trained = "adapters" if hasattr(model, "peft_config") else "weights"
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = (
                        torch.nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                    )
                    tracker.tag(fake, trained if tensor.requires_grad else "weights")
                tensors[name] = made[id(tensor)]


class TrackedHead(ResponseHead):
    """Books what the loss allocates as logits, but for what it leaves behind: the gradients it forms.

    Autograd adds the two gradients of a tied weight in place, but not on fake tensors, where it would make a third. So
    the head has a weight of its own meanwhile, in the same memory.
    """

    def __init__(self, model: "PreTrainedModel", tracker: StorageTracker) -> None:
        super().__init__(model)
        self.tracker = tracker
        self.tied = (
            self.head.weight if self.head.weight is model.get_input_embeddings().weight else None
        )
        if self.tied is not None:
            self.head.weight = torch.nn.Parameter(self.tied.detach(), self.tied.requires_grad)

    def tie(self) -> None:
        if self.tied is not None:
            self.head.weight = self.tied

    def forward(self, head: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        first = len(self.tracker.sizes)
        with self.tracker.tagging("logits"):
            loss = super().forward(head, hidden_states)
        for number in self.tracker.numbers.values():
            if number >= first:
                self.tracker.kinds[number] = "activations"
        return loss
