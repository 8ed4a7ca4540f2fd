"""A run that learns nothing any more: its loss or its weights are not finite, or do not move."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from finetuning.errors import UserError


class FirstNonFinite:
    """The first step whose loss was not finite, found without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.step = torch.zeros((), dtype=torch.long, device=device)  # 0: none so far
        self.copied: tuple[torch.cuda.Event, torch.Tensor] | None = None

    def look_at(self, loss: torch.Tensor, step: int) -> None:
        self.step += step * (~loss.isfinite() & (self.step == 0))

    def forget(self) -> None:
        self.step.zero_()

    def poll(self) -> int:
        """The step, or 0; of a GPU what it was when this was last asked, which is there by now."""
        if self.step.device.type != "cuda":
            return int(self.step)
        answer = 0
        if self.copied is not None:
            event, copy = self.copied
            event.synchronize()
            answer = int(copy)
        copy = torch.empty((), dtype=torch.long, pin_memory=True)
        copy.copy_(self.step, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.copied = event, copy
        return answer


def norms_of(model: torch.nn.Module) -> torch.Tensor:
    """(trained weights,) norms of what this process has of each; not finite where a weight is
    not."""
    parts = [local_part(weight.detach()) for weight in model.parameters() if weight.requires_grad]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
    return torch.stack(norms) if norms else torch.zeros(0)


def local_part(weight: Any) -> torch.Tensor:
    """Of a weight that ZeRO-3 or FSDP2 has sharded."""
    part: torch.Tensor = getattr(weight, "ds_tensor", weight)
    return part.to_local() if isinstance(part, DTensor) else part


def diverged(args: Any, what: str) -> UserError:
    """The loss or the weights of a run have become infinite, or no numbers."""
    remedies = [f"training.learning_rate={args.learning_rate / 10:.0e}"]
    if not args.warmup_steps:
        remedies.append("training.warmup_steps=0.1")
    if args.fp16:
        remedies.append("training.bf16=true on a GPU that has it")
    if not 0 < args.max_grad_norm <= 1:
        remedies.append("training.max_grad_norm=1.0")
    remedies += [f"training.max_grad_norm={args.max_grad_norm / 4:g}", "training.adam_beta2=0.95"]
    return UserError(
        f"{what}; the checkpoints before it are kept; most likely to help, in another "
        f"training.output_dir: {', '.join(remedies[:3])}"
    )


def unmoved(args: Any, steps: int) -> UserError:
    """No trained weight has changed."""
    if not steps:
        return UserError("training.max_steps: no step was taken, so nothing was learnt")
    return UserError(
        f"no trained weight has moved in {steps} steps, so nothing was learnt; "
        f"training.learning_rate is {args.learning_rate:g}: see there, lora.lora_alpha, "
        "lora.lora_dropout, and model.dtype, which may be too coarse for so small a rate"
    )
