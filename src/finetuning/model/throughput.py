"""How much was computed, how fast, and how well: counted on the host or left on the device until it is logged."""

import time
from typing import TYPE_CHECKING, Any

import torch

from finetuning.launch.devices import peak_of
from finetuning.model.flops import matmul_params_of
from finetuning.model.loss import Scores

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class Throughput:
    """Sums over micro-batches since the last log. No figure leaves the device in between."""

    def __init__(self, model: "PreTrainedModel", device: torch.device) -> None:
        self.products = matmul_params_of(model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_of(name)
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.loss = torch.zeros(
            (), dtype=torch.float64 if self.device.type != "mps" else torch.float32
        )
        self.loss = self.loss.to(self.device)
        self.correct = torch.zeros((), dtype=torch.long, device=self.device)
        self.responses = self.tokens = self.slots = 0
        self.since = time.perf_counter()

    def count(self, inputs: dict[str, Any], scores: Scores) -> None:
        self.loss += scores.loss.detach()
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
        """Goes on with the sums of these states: one, or several or none where the number of processes has changed."""

        def sum_of(name: str) -> float:
            return sum(state[name] for state in states)

        self.loss.fill_(sum_of("loss"))
        self.correct.fill_(sum_of("correct"))
        self.responses, self.tokens, self.slots = (
            sum_of("responses"),
            sum_of("tokens"),
            sum_of("slots"),
        )
        self.since = time.perf_counter() - max((state["seconds"] for state in states), default=0.0)

    def flops_of(self, inputs: dict[str, Any]) -> int:
        return self.products.flops(sum(inputs["lengths"]), len(inputs["targets"]))

    def totals(self, accelerator: "Accelerator") -> list[float]:
        """[loss, correct, responses, tokens, slots] over all processes."""
        counts = torch.tensor(
            [self.responses, self.tokens, self.slots], dtype=self.loss.dtype, device=self.device
        )
        sums = torch.cat([torch.stack([self.loss, self.correct.to(self.loss.dtype)]), counts])
        return accelerator.reduce(sums).tolist()

    def loss_and_accuracy(self, accelerator: "Accelerator") -> tuple[float, float]:
        """Mean cross-entropy of a response token, and the share of them that is the likeliest token."""
        loss, correct, responses, _, _ = self.totals(accelerator)
        return loss / max(1.0, responses), correct / max(1.0, responses)

    def since_last_log(self, accelerator: "Accelerator") -> dict[str, float]:
        _, correct, responses, tokens, slots = self.totals(accelerator)  # waits for the device
        seconds = time.perf_counter() - self.since
        self.reset()
        figures = {
            "mean_token_accuracy": correct / max(1.0, responses),
            "response_tokens_per_second": responses / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / max(1.0, slots),
        }
        if self.peak:
            used = self.products.flops(tokens, responses) / seconds
            figures["model_flops_share"] = used / (self.peak * accelerator.num_processes)
        return figures
