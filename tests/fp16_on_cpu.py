"""fp16 in processes on a CPU as on a GPU: accelerate and DeepSpeed leave it to accelerators.

The CPU's own autocast and gradient scaler take the place of CUDA's; DeepSpeed is told that the CPU
has fp16, which torch computes, if slowly.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import get_fsdp2_grad_scaler
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from finetuning.training import sft_config

begin = Accelerator.__init__


def begin_with_fp16(self: Accelerator, *args: object, **kwargs: object) -> None:
    begin(self, *args, **kwargs)
    if self.mixed_precision != "fp16" or self.distributed_type == DistributedType.DEEPSPEED:
        return
    self.native_amp = True
    make = get_fsdp2_grad_scaler if self.is_fsdp2 else torch.amp.GradScaler
    self.scaler = make(device="cpu")


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """Within, training is in fp16."""
    with ExitStack() as stack:
        formats = {"bf16": False, "fp16": True}
        stack.enter_context(mock.patch.object(sft_config, "precision", lambda *_: formats))
        stack.enter_context(mock.patch.object(Accelerator, "__init__", begin_with_fp16))
        supported = mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda _: True)
        stack.enter_context(supported)
        yield
