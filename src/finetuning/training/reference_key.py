"""The name of a cached reference: a digest of all that decides it."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

from finetuning.launch.software import versions
from finetuning.training.divergence import local_part
from finetuning.training.preference_trainer import PreferenceTrainer
from finetuning.training.prepared_run import PreparedRun

PACKAGE = Path(__file__).parents[1]
BATCHES = ("batch_sampler", "bin_packing", "collator", "dummies", "example_set", "examples")
COMPUTING = ("trainer", "preference_trainer", "reference")
# Modules of this package that a log-probability depends on; an edit of one makes the cache stale.
CODE = sorted(
    [
        *(PACKAGE / "model").glob("*.py"),
        *(PACKAGE / "data" / f"{name}.py" for name in BATCHES),
        *(PACKAGE / "training" / f"{name}.py" for name in COMPUTING),
    ]
)

PLACES = ("_name_or_path", "base_model_name_or_path", "revision")  # where a model was found


def reference_key(trainer: PreferenceTrainer, run: PreparedRun, used: NDArray[np.int64]) -> str:
    """Digest of all that decides the reference, to the bit: weights, pairs, precision, device, the
    shape of its batches, libraries and code. The same in every process.

    used: numbers of the training pairs that are compared with it.
    """
    args = trainer.args
    is_gpu = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if is_gpu else platform.machine()
    formats = [args.bf16, args.fp16, args.tf32, device, trainer.model.config._attn_implementation]
    batches = [args.per_device_eval_batch_size, args.world_size, run.recipe.data.layout]
    pairs = [run.examples.fingerprint, hashlib.sha256(used.tobytes()).hexdigest()]
    code = [path.read_text(encoding="utf-8") for path in CODE]
    weights = gather_object([digest_of_weights(trainer)])
    decides = [weights, settings_of(trainer.model), pairs, formats, batches, versions(), code]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=plain).encode()).hexdigest()


def plain(value: Any) -> Any:
    """For JSON; a set has another order in another process."""
    return sorted(value) if isinstance(value, set) else str(value)


def settings_of(model: Any) -> list[dict[str, Any]]:
    """What the same weights may be computed with in other ways: rope_theta, lora_alpha, ..."""
    adapters = getattr(model, "peft_config", {}).values()
    settings = [model.config.to_dict(), *(config.to_dict() for config in adapters)]
    return [{k: v for k, v in each.items() if k not in PLACES} for each in settings]


def digest_of_weights(trainer: PreferenceTrainer) -> str:
    """Of what this process holds of the model, adapter, buffers and scales of quantized weights
    among it.
    """
    # Under ZeRO-3 a state_dict is of empty tensors.
    tensors: dict[str, Any] = {**trainer.model.state_dict()}
    tensors |= dict(trainer.model.named_parameters())
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        part = local_part(tensor.detach()).contiguous()
        digest.update(f"{name} {part.dtype} {list(part.shape)}".encode())
        digest.update(part.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
