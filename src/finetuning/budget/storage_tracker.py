"""Every storage that a step allocates and frees, recorded; and the peak, looked up afterwards.

Used by step_memory.py, whose tensors have no bytes: a storage is only its size.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits")


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
