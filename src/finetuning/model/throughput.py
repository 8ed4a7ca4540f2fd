"""Loss, accuracy, tokens per second and share of the device's peak FLOP/s since the last log."""

import math
import time
from typing import TYPE_CHECKING, Any

import psutil
import torch

from finetuning.launch.devices import peak_of
from finetuning.model.flops import matmul_params_of
from finetuning.model.loss import Scores

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class Throughput:
    """Sums over micro-batches since the last log.

    Counted on the host, or left on the device until they are logged: no step waits for a figure.
    """

    def __init__(self, model: "PreTrainedModel", device: torch.device) -> None:
        self.matmul_params = matmul_params_of(model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_of(name)
        self.device = device
        self.reset()

    def reset(self) -> None:
        dtype = torch.float64 if self.device.type != "mps" else torch.float32
        self.loss = torch.zeros((), dtype=dtype, device=self.device)
        self.correct = torch.zeros((), dtype=torch.long, device=self.device)
        self.responses = self.tokens = 0
        self.slots = 0  # positions computed, those that are padding too
        self.since = time.perf_counter()

    def count(self, inputs: dict[str, Any], scores: Scores) -> None:
        self.loss += scores.loss.sum()
        self.correct += scores.correct
        self.responses += len(inputs["targets"])
        self.tokens += sum(inputs["lengths"])
        self.slots += inputs["input_ids"].numel()

    def state(self) -> dict[str, float]:
        """What was counted since the last log, exactly."""
        return {
            "loss": self.loss.item(),
            "correct": self.correct.item(),
            "responses": self.responses,
            "tokens": self.tokens,
            "slots": self.slots,
            "seconds": time.perf_counter() - self.since,
        }

    def restore(self, states: list[dict[str, float]]) -> None:
        """Continues from these states: one, or several or none if there were other processes."""

        def total(name: str) -> float:
            return sum(state[name] for state in states)

        self.loss.fill_(total("loss"))
        self.correct.fill_(total("correct"))
        self.responses = int(total("responses"))
        self.tokens, self.slots = int(total("tokens")), int(total("slots"))
        self.since = time.perf_counter() - max((state["seconds"] for state in states), default=0.0)

    def flops_of(self, inputs: dict[str, Any]) -> int:
        return int(self.matmul_params.flops(sum(inputs["lengths"]), len(inputs["targets"])))

    def totals(self, accelerator: "Accelerator") -> list[float]:
        """[loss, correct, responses, tokens, slots] over all processes."""
        counts = torch.tensor(
            [self.responses, self.tokens, self.slots], dtype=self.loss.dtype, device=self.device
        )
        sums = torch.cat([torch.stack([self.loss, self.correct.to(self.loss.dtype)]), counts])
        reduced: list[float] = accelerator.reduce(sums).tolist()
        return reduced

    def evaluation(self, accelerator: "Accelerator") -> dict[str, float]:
        """Mean cross-entropy of a response token, and the share that is the likeliest token."""
        loss, correct, responses, _, _ = self.totals(accelerator)
        mean = loss / max(1.0, responses)
        return {
            "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "mean_token_accuracy": correct / max(1.0, responses),
        }

    def since_last_log(self, accelerator: "Accelerator") -> dict[str, float]:
        _, correct, responses, tokens, slots = self.totals(accelerator)  # waits for the device
        seconds = time.perf_counter() - self.since
        self.reset()
        figures = {
            "mean_token_accuracy": correct / max(1.0, responses),
            "response_tokens_per_second": responses / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / max(1.0, slots),
            "memory_gib": memory_in_use(self.device) / 2**30,
        }
        if self.peak:
            used = self.matmul_params.flops(tokens, responses) / seconds
            figures["model_flops_share"] = used / (self.peak * accelerator.num_processes)
        return figures


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took on this process's GPU so far, or what it takes of memory
    now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
