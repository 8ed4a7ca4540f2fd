"""How the processes of a run share the work: the requested strategy, and the actual one.

The two silently differ in several set-ups of accelerate: FSDP on a CPU runs as DDP, and so
does ZeRO where ACCELERATE_USE_CPU is set; MULTI_CPU, or --cpu with --num_processes 2, starts one
process. A run names its actual strategy, and is refused where that is not the requested one.
"""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError
from finetuning.launch.launcher import requested_processes

if TYPE_CHECKING:
    from transformers import Trainer


# Distributed types of accelerate that start one process, however many are asked for.
ALONE = ("NO", "MULTI_CPU")


@dataclass(frozen=True)
class Strategy:
    name: str
    """single, ddp, fsdp, zero1, zero2 or zero3"""
    processes: int
    offload: bool = False
    """optimizer or weights are kept in main memory"""

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only a part of each weight."""
        return self.name in ("fsdp", "zero3")

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.name}{' with offload' if self.offload else ''}, {processes}"


def requested_strategy() -> Strategy:
    """What accelerate launch or torchrun was told, from the environment that they give to a
    process."""
    processes = requested_processes()
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"accelerate started one process where {processes} were asked for: the config's "
            "distributed_type starts no more; use accelerate_configs/ddp.yaml, or cpu_ddp.yaml "
            "without GPUs"
        )
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        zero = zero_settings()
        return Strategy(f"zero{zero.get('stage', 0)}", processes, offloads(zero))
    if is_set("ACCELERATE_USE_FSDP"):
        return Strategy("fsdp", processes, is_set("FSDP_OFFLOAD_PARAMS"))
    return Strategy("ddp" if processes > 1 else "single", processes)


def launch_environment(file: str | None, processes: str | None) -> dict[str, str]:
    """What `accelerate launch --config_file ... --num_processes ...` would say to its processes, as
    far as it matters.

    Raises UserError if it could not start them.
    """
    if processes is not None and (not processes.isdecimal() or int(processes) < 1):
        raise UserError(f"--num_processes {processes}: expected a whole number, at least 1")
    if file is None:
        return {"WORLD_SIZE": processes} if processes else {}
    config = read_accelerate_config(file)
    count = int(processes or config.num_processes or 0)
    require_processes(file, config, count)
    said = {"WORLD_SIZE": count, **variables_of(config)}
    return {name: str(value) for name, value in said.items() if value is not None}


def read_accelerate_config(file: str) -> Any:
    """accelerate's own ClusterConfig."""
    from accelerate.commands.config.config_args import load_config_from_file
    from yaml import YAMLError

    try:
        config = load_config_from_file(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError) as error:
        raise UserError(
            f"{file}: is no accelerate config: {' '.join(str(error).split())}"
        ) from None
    if not hasattr(config.distributed_type, "value"):  # YAML 1.1 reads a bare NO as false
        raise UserError(f"{file}: distributed_type has to be text; write 'NO' in quotes")
    return config


def require_processes(file: str, config: Any, count: int) -> None:
    """Raises UserError where the config could not start so many."""
    if count < 1:
        raise UserError(
            f"{file}: does not say how many processes; add --num_processes, such as "
            "--num_processes 2"
        )
    kind = config.distributed_type.value
    if count > 1 and kind in ALONE:
        raise UserError(
            f"{file}: distributed_type: {kind} starts one process, where {count} were asked for; "
            "use accelerate_configs/ddp.yaml, or cpu_ddp.yaml without GPUs"
        )


def variables_of(config: Any) -> dict[str, Any]:
    """As accelerate names them for the processes it starts."""
    said: dict[str, Any] = {}
    if config.gpu_ids not in (None, "all"):
        said["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    kind = config.distributed_type.value
    if kind == "DEEPSPEED":
        said |= with_prefix("ACCELERATE_DEEPSPEED_", config.deepspeed_config, "deepspeed_")
        said["ACCELERATE_USE_DEEPSPEED"] = True
    elif kind == "FSDP":
        said |= with_prefix("FSDP_", config.fsdp_config, "fsdp_")
        said["ACCELERATE_USE_FSDP"] = True
    elif kind == "NO":
        said["ACCELERATE_USE_CPU"] = config.use_cpu
    return said


def with_prefix(prefix: str, settings: dict[str, Any], old: str) -> dict[str, Any]:
    return {f"{prefix}{name.removeprefix(old).upper()}": settings[name] for name in settings}


def is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def zero_settings() -> dict[str, Any]:
    """The part zero_optimization of DeepSpeed's own file, or what an accelerate config says in its
    place."""
    zero: dict[str, Any] = {"stage": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")}
    for what in ("optimizer", "param"):
        zero[f"offload_{what}"] = {
            "device": os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        }
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        try:
            zero = dict(json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: is no DeepSpeed config with zero_optimization: {error}"
            ) from None
    return zero


def offloads(zero: dict[str, Any]) -> bool:
    devices = [
        (zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param")
    ]
    return any(device != "none" for device in devices)


def actual_strategy(trainer: "Trainer") -> Strategy:
    """What a prepared trainer really runs as."""
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        engine: Any = trainer.model_wrapped
        offload = offloads(engine.config["zero_optimization"])
        return Strategy(
            f"zero{engine.zero_optimization_stage()}", accelerator.num_processes, offload
        )
    if kind == "FSDP":
        offload = "CPUOffload" in type(accelerator.state.fsdp_plugin.cpu_offload).__name__
        return Strategy("fsdp", accelerator.num_processes, offload)
    return Strategy("ddp" if accelerator.num_processes > 1 else "single", accelerator.num_processes)


def require_strategy(trainer: "Trainer", wanted: Strategy) -> None:
    """Raises UserError where a prepared trainer does not have the requested strategy."""
    found = actual_strategy(trainer)
    if found != wanted:
        raise UserError(
            f"accelerate: asked for {wanted}, but what runs is {found}; take one of "
            "accelerate_configs/, and leave "
            "ACCELERATE_USE_CPU and --cpu out (training.use_cpu: true says it)"
        )
    mixed = trainer.accelerator.state.mixed_precision
    said = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "no"
    if mixed != said:
        raise UserError(
            f"accelerate: mixed_precision is {mixed}, the recipe's {said}; leave it out of the "
            "accelerate config, "
            "training.bf16 and training.fp16 own it"
        )


def launch_of(trainer: "Trainer", strategy: Strategy) -> dict[str, Any]:
    """How the processes run, for environment.json."""
    return {
        "strategy": strategy.name,
        "processes": strategy.processes,
        "device": str(trainer.args.device),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
