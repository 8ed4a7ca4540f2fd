"""A training step on the tensors of a GPU that is not there: shapes, formats and memory, no
numbers.

torch's FakeTensorMode computes what every operation returns without computing it, on any device it
is told. CUDA's autocast rules, the project's own code and bitsandbytes' layers run as they would on
a GPU; which attention kernel torch takes is decided here as torch 2.13 does it.
"""

import ctypes
import platform
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

HALF = (torch.float16, torch.bfloat16)
RETURN_FALSE = {
    "x86_64": bytes.fromhex("31c0c3"),  # xor eax, eax; ret
    "aarch64": bytes.fromhex("00008052c0035fd6"),  # mov w0, #0; ret
}
CPU, CUDA, DEVICE_TYPES = 0, 1, 22
PAGE = 2**14

needs_fake_cuda = pytest.mark.skipif(
    torch.cuda.is_available() or platform.machine() not in RETURN_FALSE,
    reason="there is a real GPU, or a processor whose machine code the test does not know",
)


@contextmanager
def autograd_without_cuda() -> Iterator[None]:
    """Lets autograd go backward through CUDA tensors where torch has no CUDA.

    Its engine asks for a device's guard, which is then the CPU's, one that does nothing, and
    whether a device is an accelerator, which is then none. Both stand in torch's libraries.
    """
    libraries = Path(torch.__file__).parent / "lib"
    c10 = ctypes.CDLL(str(libraries / "libc10.so"))
    cpu = ctypes.CDLL(str(libraries / "libtorch_cpu.so"))
    guards = (ctypes.c_void_p * DEVICE_TYPES).in_dll(
        c10, "_ZN3c104impl26device_guard_impl_registryE"
    )
    function = cpu["_ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE"]
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    code = RETURN_FALSE[platform.machine()]
    guard, original = guards[CUDA], ctypes.string_at(address, len(code))
    writable = ctypes.c_void_p(address & -PAGE)
    assert ctypes.CDLL(None).mprotect(writable, 2 * PAGE, 7) == 0
    guards[CUDA] = guards[CPU]
    ctypes.memmove(address, code, len(code))
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        ctypes.memmove(address, original, len(code))
        guards[CUDA] = guard


class Trace(TorchDispatchMode):
    """What the operations on CUDA tensors do, by the phase in which they do it."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.flops: Counter[tuple[str, torch.dtype]] = Counter()
        """of matrix products, by phase and format of what is multiplied"""
        self.operations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        """that attention would take"""
        self.waits: list[str] = []
        """for a value of the device, or for a copy"""
        self.storages: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.allocated = self.peak = 0
        self.marks: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        flat = torch.utils._pytree.tree_leaves((args, kwargs, output))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in flat):
            self.operations[str(func).removeprefix("aten.")] += 1
            self.note_copy(func, args, kwargs)
            self.note_product(str(func), args)
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                self.allocate(tensor.untyped_storage())
        return output

    def note_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        to = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and to is not None:
            source, target = args[0].device.type, torch.device(to).type
            if source == "cuda" and target == "cpu":
                self.waits.append("copy to the host")
            if source == "cpu" and target == "cuda" and not kwargs.get("non_blocking"):
                self.waits.append("blocking copy to the device")
        if func is torch.ops.aten.nonzero.default:
            self.waits.append("nonzero")

    def note_product(self, name: str, args: Any) -> None:
        if name in ("bitsandbytes.int8_mixed_scaled_mm.default",):
            self.flops[self.phase, torch.int8] += 2 * args[1].numel() * args[2].shape[0]
        elif name == "bitsandbytes.gemm_4bit.default":
            self.flops[self.phase, args[0].dtype] += 2 * args[0].numel() * args[2][0]
        elif name.startswith("aten.") and "mm" in name:
            left, right = args[1:3] if "add" in name else args[:2]
            self.flops[self.phase, left.dtype] += 2 * left.numel() * right.shape[-1]

    def allocate(self, storage: Any) -> None:
        if storage not in self.storages:
            size = storage.nbytes()
            size = self.storages[storage] = size if isinstance(size, int) else 0
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.allocated -= size

    def mark(self, name: str) -> None:
        """Keeps how many bytes are allocated now, under a name."""
        self.marks[name] = self.allocated


def choose_kernel(trace: Trace, capability: tuple[int, int]) -> Any:
    """F.scaled_dot_product_attention with torch 2.13's choice of a kernel (sdp_utils.cpp)."""
    math = F.scaled_dot_product_attention
    aten = torch.ops.aten

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        size, groups = query.shape[-1], query.shape[1] // key.shape[1]
        is_half, is_gqa = query.dtype in HALF, enable_gqa and groups > 1
        fits_flash = size <= 256 and size == value.shape[-1] and attn_mask is None
        if capability >= (8, 0) and is_half and fits_flash:
            trace.kernels["flash"] += 1
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        lacks_bf16 = query.dtype == torch.bfloat16 and capability < (8, 0)
        if not is_gqa and size % 8 == 0 and not lacks_bf16:
            trace.kernels["memory-efficient"] += 1
            if attn_mask is not None:
                if any(stride % 8 for stride in attn_mask.stride()[:-1]):
                    trace.kernels["mask copied to an aligned one"] += 1
                    length = attn_mask.shape[-1]
                    attn_mask = F.pad(attn_mask, (0, 8 - length % 8))[..., :length]
                attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
            needs = any(x.requires_grad for x in (query, key, value))
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, needs, dropout_p, is_causal, scale=scale
            )[0]
        trace.kernels["math"] += 1
        return math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=is_gqa
        )

    return attention


def asked(trace: Trace, value: Any) -> Any:
    """A method of a tensor that waits for its value."""

    def ask(self: Any, *args: Any) -> Any:
        if self.is_cuda:
            trace.waits.append("value of the device")
        return value

    return ask


@contextmanager
def fake_gpu(capability: tuple[int, int]) -> Iterator[Trace]:
    """Within, tensors are fake, and those on `cuda:0` on a GPU of this compute capability."""
    trace = Trace()
    values = {"__bool__": False, "item": 1.0, "tolist": [1], "__int__": 1, "__float__": 1.0}
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(autograd_without_cuda())
        for name, value in values.items():
            enter(mock.patch.object(FakeTensor, name, asked(trace, value)))
        enter(mock.patch("torch.cuda.get_device_capability", lambda *_: capability))
        enter(mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
        enter(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        enter(mock.patch.object(masking_utils, "is_tracing", lambda *_: False))
        enter(
            mock.patch.object(F, "scaled_dot_product_attention", choose_kernel(trace, capability))
        )
        enter(FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))
        yield trace


def to_fake_gpu(model: torch.nn.Module) -> None:
    """Weights and buffers on the fake GPU, the same one wherever a weight is shared."""
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]


def batch_of(lengths: list[int], layout: str = "packed", response: float = 0.5) -> dict[str, Any]:
    """Examples of these lengths; this share of each, at its end, is the response."""
    from finetuning.data.collator import Collator

    def example(length: int) -> dict[str, np.ndarray]:
        ids = np.full(length, 5)
        return {
            "input_ids": ids,
            "labels": np.where(np.arange(length) < length * (1 - response), -100, ids),
        }

    return Collator(layout, 0)([example(length) for length in lengths])


def batch_of_pairs(prompts: list[int], response: int) -> dict[str, Any]:
    """Packed pairs of prompts of these lengths and two responses of so many tokens."""
    from finetuning.data.collator import Collator

    def pair(prompt: int) -> dict[str, Any]:
        shared, chosen = prompt - 1, prompt + response
        ids = np.full(chosen + 1 + response, 5)
        at = np.arange(len(ids))
        labels = np.where((at < prompt) | (at == chosen), -100, ids)
        return {"input_ids": ids, "labels": labels, "chosen": chosen, "shared": shared}

    return Collator("packed", 0)([pair(prompt) for prompt in prompts])


def training_step(
    trace: Trace, model: Any, batch: dict[str, Any], autocast: torch.dtype | None
) -> SimpleNamespace:
    """Forward and backward of a model whose weights are on the fake GPU; what is allocated when."""
    from finetuning.model.packing import Packing, packed_as
    from finetuning.model.response_head import ResponseHead, Targets

    inputs = {
        name: torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batch.items()
    }
    head = ResponseHead(model)
    arguments = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
    trace.mark("weights")
    with (
        packed_as(Packing.of(inputs)),
        head.scoring(Targets(inputs["positions"], inputs["targets"])),
    ):
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            loss = model(**arguments, use_cache=False).logits
        trace.mark("forward")
        trace.phase = "backward"
        loss.backward()
