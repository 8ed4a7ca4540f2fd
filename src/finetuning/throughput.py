"""How much was computed, how fast, and how well: counted on the host or left on the device until it is logged."""

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from finetuning.devices import peak_of
from finetuning.loss import Scores
from finetuning.model import shape_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class Products(NamedTuple):
    """How many numbers of a model's linear layers every token is multiplied by, and every response token by the head's.

    Embeddings are looked up and not multiplied, tied or not. Attention among the tokens is not counted.
    """

    layers: int
    trained: int
    """of these"""
    head: int
    trained_head: int

    def flops(self, tokens: float, responses: float, forwards: int = 1) -> float:
        """Of training on so many tokens, so many of them responses; two forwards where activations are checkpointed.

        Two FLOPs a number and token forward, two backward for the activations, and two for a trained weight's gradient.
        """
        per_token = 2 * ((forwards + 1) * self.layers + self.trained)
        return per_token * tokens + 2 * (2 * self.head + self.trained_head) * responses


def products_of(model: "PreTrainedModel") -> Products:
    """By the layers' shapes: a weight in 4 bits has half its numbers, and one that ZeRO-3 has shared out none."""

    def size(layer: torch.nn.Module) -> int:
        return layer.nf * layer.nx if isinstance(layer, Conv1D) else layer.in_features * layer.out_features

    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    sizes = [(size(layer), layer.weight.requires_grad) for layer in layers if layer is not head]
    taken = getattr(model.config.get_text_config(), "num_experts_per_tok", 1)  # of a mixture, by each token
    shapes = [(shape_of(weight), weight.requires_grad) for weight in model.parameters()]
    sizes += [(taken * shape[1] * shape[2], requires_grad) for shape, requires_grad in shapes if len(shape) == 3]
    trained = sum(numbers for numbers, requires_grad in sizes if requires_grad)
    return Products(
        sum(numbers for numbers, _ in sizes), trained, size(head), size(head) if head.weight.requires_grad else 0
    )


class Throughput:
    """Sums over micro-batches since the last log. No figure leaves the device in between."""

    def __init__(self, model: "PreTrainedModel", device: torch.device) -> None:
        self.products = products_of(model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_of(name)
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64 if self.device.type != "mps" else torch.float32)
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
        self.responses, self.tokens, self.slots = sum_of("responses"), sum_of("tokens"), sum_of("slots")
        self.since = time.perf_counter() - max((state["seconds"] for state in states), default=0.0)

    def flops_of(self, inputs: dict[str, Any]) -> int:
        return self.products.flops(sum(inputs["lengths"]), len(inputs["targets"]))

    def totals(self, accelerator: "Accelerator") -> list[float]:
        """[loss, correct, responses, tokens, slots] over all processes."""
        counts = torch.tensor([self.responses, self.tokens, self.slots], dtype=self.loss.dtype, device=self.device)
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
