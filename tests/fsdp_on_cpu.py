"""Runs a script as accelerate would run it with FSDP on GPUs, but on CPUs over gloo.

accelerate takes FSDP's route for accelerators only, and silently runs DDP on CPUs. PyTorch's FSDP2
itself does not mind: told that gloo's processes are GPUs, accelerate goes the same route, save for
the device.

accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \\
  tests/fsdp_on_cpu.py src/sft.py ...
"""

import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

begin = AcceleratorState.__init__


def begin_as_if_on_gpus(self: AcceleratorState, *args: object, **kwargs: object) -> None:
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    begin(self, *args, **kwargs)


def main(script: str, *arguments: str) -> None:
    sys.path[0] = str(Path(__file__).parents[1] / "src")
    from finetuning.launch import compatibility

    compatibility.has_gpu = lambda: True
    AcceleratorState.__init__ = begin_as_if_on_gpus
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
