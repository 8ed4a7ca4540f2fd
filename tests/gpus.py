"""What a test that is marked `gpu` needs of this machine's GPUs, and what they lack of it."""

import torch


def lacking(count: int = 1, capability: tuple[int, int] = (0, 0)) -> str | None:
    """Why a test that needs so many GPUs, of this compute capability at least, is skipped."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        return "no GPU that torch can use is shown to this test: make test-gpu"
    if found < count:
        return f"needs {count} GPUs, there is {found}"
    if torch.cuda.get_device_capability() < capability:
        return f"needs compute capability {dotted(capability)}, this GPU has {own_capability()}"
    return None


def dotted(capability: tuple[int, int]) -> str:
    """As NVIDIA writes it."""
    return ".".join(map(str, capability))


def own_capability() -> str:
    return dotted(torch.cuda.get_device_capability())


def why_no_gpu() -> str:
    """torch's own reason, in one line, for having no GPU."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return " ".join(str(error).split())
    return "torch.cuda.is_available() is false"
