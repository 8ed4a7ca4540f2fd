"""What a run computes on: GPUs by name, and the machine at hand."""

import re
from dataclasses import dataclass

from finetuning.errors import UserError
from finetuning.launch.strategy import is_set
from finetuning.recipe.recipe import Recipe

GIB = 2**30


@dataclass(frozen=True)
class Device:
    name: str
    memory: int
    """bytes that a program can have"""
    flops: float
    """peak of dense half-precision products with sums in float32, FLOP/s; on a CPU of float32, as
    measured"""
    capability: tuple[int, int] | None
    """CUDA compute capability; None for a CPU"""

    @property
    def is_gpu(self) -> bool:
        return self.capability is not None


# Memory as torch reports it, which is less than what is written on the box; FLOP/s as in NVIDIA's
# data sheets.
GPUS = {
    "t4": Device("T4", int(14.7 * GIB), 65e12, (7, 5)),
    "l4": Device("L4", int(22.0 * GIB), 121e12, (8, 9)),
    "a10g": Device("A10G", int(22.0 * GIB), 125e12, (8, 6)),
    "rtx3090": Device("RTX 3090", int(23.6 * GIB), 71e12, (8, 6)),
    "rtx4090": Device("RTX 4090", int(23.6 * GIB), 165e12, (8, 9)),
    "a100": Device("A100", int(39.4 * GIB), 312e12, (8, 0)),
    "a100-40": Device("A100", int(39.4 * GIB), 312e12, (8, 0)),
    "a100-80": Device("A100", int(79.1 * GIB), 312e12, (8, 0)),
    "h100": Device("H100", int(79.1 * GIB), 989e12, (9, 0)),
    "h200": Device("H200", int(139.8 * GIB), 989e12, (9, 0)),
}


def gpu_by_name(name: str) -> Device:
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: unknown; allowed are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def peak_of(name: str) -> float | None:
    """FLOP/s of a GPU by the name that torch has for it, such as `Tesla T4`; None where it is not
    known."""
    return next(
        (device.flops for device in GPUS.values() if re.search(rf"\b{device.name}\b", name)), None
    )


def uses_gpu(recipe: Recipe) -> bool:
    """Whether training here is on a GPU: there is one, and neither recipe nor `accelerate launch`
    keep to the CPU."""
    import torch

    return torch.cuda.is_available() and not (
        recipe.training.use_cpu or is_set("ACCELERATE_USE_CPU")
    )


def require_kernels() -> None:
    """Raises UserError for a GPU that the installed torch has no kernels for.

    Any operation would fail on it, in the middle of the start.
    """
    import torch

    capability, compiled = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not has_kernels(capability, compiled):
        major, minor = capability
        raise UserError(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and torch "
            f"{torch.__version__} is compiled for {', '.join(compiled)} only; install the wheel "
            f"that has 5.0 to 9.0: pip install torch=={torch.__version__.partition('+')[0]}+cu126 "
            "--index-url https://download.pytorch.org/whl/cu126 (or say training.use_cpu=true)"
        )


def has_kernels(capability: tuple[int, int], compiled: list[str]) -> bool:
    """By torch.cuda.get_arch_list(), such as sm_75 and compute_120.

    Machine code runs on later minor versions, PTX (compute_...) on all later ones.
    """
    for name in compiled:
        kind, _, digits = name.partition("_")
        number = int(re.sub(r"\D", "", digits))
        built = divmod(number, 10)
        if kind == "compute" and built <= capability:
            return True
        if built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def local_device(recipe: Recipe) -> Device:
    """What the recipe would be trained on here: the first GPU of this machine, or its CPU."""
    import psutil
    import torch

    if uses_gpu(recipe):
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        return Device(
            properties.name, properties.total_memory, peak_of(properties.name) or 0.0, capability
        )
    return Device("this CPU", psutil.virtual_memory().total, measured_flops(), None)


def measured_flops() -> float:
    """FLOP/s of a matrix product on the CPU: the best of a few, some hundredths of a second
    each."""
    import time

    import torch

    size, seconds = 768, []
    a, b = torch.ones(size, size), torch.ones(size, size)
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
