"""Hidden states -> loss over response tokens, without the logits of any other token.

The head's weight and the cross-entropy meet in tiles of a few rows: no (B, T, V) logits exist. The
gradient is formed while a tile's logits are at hand, so that backward has nothing to compute again:
three matrix products, two with a frozen head, where recomputing takes four and three. The idea is
that of Liger's fused linear cross-entropy (https://github.com/linkedin/Liger-Kernel), here in plain
torch for every device.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from finetuning.errors import UserError
from finetuning.model.lora import require_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuning.recipe.sections import Lora

TILE_LOGITS = 2**24  # alive at once: 64 MiB in float32
# But no fewer rows: below, a core multiplies a vocabulary of 250,880 a fifth slower.
TILE_ROWS = 128
# Fields of a config by which a model caps or scales its logits.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class Targets(NamedTuple):
    """Which positions are scored, and against which token."""

    positions: torch.Tensor
    """(N,) in the flattened (B * T) hidden states, each one before its target"""
    tokens: torch.Tensor
    """(N,)"""


class Scores(NamedTuple):
    loss: torch.Tensor
    """() cross-entropy, summed over the N targets"""
    correct: torch.Tensor
    """() how many targets are the likeliest token"""


class ResponseHead:
    """A model's output embeddings, made to score targets instead of returning logits.

    The head is still called as the module it is, inside the model's own forward: what DDP, ZeRO-3
    and FSDP2 hook there (gathering its weight, say) they find as ever.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.head: Any = model.get_output_embeddings()
        self.targets: Targets | None = None
        self.scores: Scores | None = None
        """of the last batch"""
        self.head.forward = types.MethodType(self.forward, self.head)

    @contextmanager
    def scoring(self, targets: Targets) -> Iterator[None]:
        """Within, the model's `logits` are the loss, summed over the targets."""
        self.targets = targets
        try:
            yield
        finally:
            self.targets = None

    @torch.no_grad()
    def require_unmodified_logits(self, model: "PreTrainedModel") -> None:
        """Raises UserError for a model that changes the logits its head returns.

        What it returns is then not the loss, and it would silently train with other gradients than
        those of the loss that is logged.
        """
        tokens = torch.arange(5, 13, device=model.device)
        was_training = model.training
        model.train(False)
        try:
            with self.scoring(Targets(torch.arange(7, device=model.device), tokens[1:])):
                returned = model(input_ids=tokens[None], use_cache=False).logits
        finally:
            model.train(was_training)
        if self.scores is None or not torch.equal(returned.float(), self.scores.loss.float()):
            kind = model.config.model_type
            raise UserError(
                f"model.name: {kind} models scale, cap or cut their logits, which is not supported"
            )

    def forward(self, head: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.targets is None:
            return F.linear(hidden_states, head.weight, head.bias)
        hidden = hidden_states.flatten(0, -2).index_select(0, self.targets.positions)
        loss, correct = response_loss(hidden, head.weight, head.bias, self.targets.tokens)
        # Detached: the graph would live until the next batch, with bitsandbytes' activations in it.
        self.scores = Scores(loss.detach(), correct)
        return loss


def require_plain_head(model: "PreTrainedModel", lora: "Lora | None") -> None:
    """Raises UserError where the loss is more than a product with the head's weight.

    That is with scaled or capped logits, and with an adapter on the head; and where the adapter
    would not be what was asked for: see require_modules.
    """
    config = model.config.get_text_config()
    modified = [name for name in (*CAPS, *SCALES) if getattr(config, name, None) not in (None, 1)]
    head = model.get_output_embeddings()
    if modified or type(head) is not torch.nn.Linear:
        what = modified[0] if modified else type(head).__name__
        raise UserError(
            f"model.name: the output layer of {config.model_type} models ({what}) is not supported"
        )
    given = lora.model_dump(exclude_unset=True) if lora else {}
    fields = ("target_modules", "modules_to_save", "trainable_token_indices")
    if any("lm_head" in names for field in fields if (names := given.get(field))):
        raise UserError(
            "lora: lm_head cannot be adapted: the loss is computed from its weight; leave it out"
        )
    is_tied = head.weight is model.get_input_embeddings().weight
    if given.get("trainable_token_indices") and is_tied:
        raise UserError(
            f"lora.trainable_token_indices: the {config.model_type} model's output layer has the "
            "weight of its embeddings, and the loss is computed from it; leave it out"
        )
    require_modules(model, given)


class ResponseLoss(torch.autograd.Function):
    """hidden (N, C), weight (V, C), bias (V,) or None, tokens (N,) -> Scores."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        device, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        grad_hidden: Any = torch.empty_like(rows) if needs_hidden else None
        grad_weight: Any = torch.zeros_like(weight) if needs_weight else None
        grad_bias: Any = torch.zeros_like(weight[:, 0]) if needs_bias else None
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        step = max(TILE_ROWS, TILE_LOGITS // weight.shape[0])
        for start in range(0, len(rows), step):
            tile, wanted = rows[start : start + step], tokens[start : start + step, None]
            logits = F.linear(tile, matrix, offset).float()
            of_target = logits.gather(1, wanted)
            top = logits.amax(1, keepdim=True)
            correct += (of_target == top).sum()
            exp = logits.sub_(top).exp_()  # in place: a tile is large
            total = exp.sum(1, keepdim=True)
            loss += (total.log() + top - of_target).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                del logits, exp
                continue
            # softmax - one-hot
            grad = exp.div_(total).scatter_add_(1, wanted, torch.full_like(of_target, -1.0))
            if needs_bias:
                grad_bias += grad.sum(0).to(grad_bias.dtype)
            grad = grad.to(dtype)
            if needs_hidden:
                torch.mm(grad, matrix, out=grad_hidden[start : start + step])
            if needs_weight and dtype == weight.dtype:
                grad_weight.addmm_(grad.t(), tile)
            elif needs_weight:
                grad_weight += grad.t() @ tile
            del logits, exp, grad  # one and the same tile: it goes before the next one comes
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        # Scaled here and not in forward: only now is the factor known (accumulation, fp16's scale).
        factor = grad_outputs[0]
        hidden, weight, bias = (
            None if gradient is None else gradient.mul_(factor) for gradient in ctx.gradients
        )
        ctx.gradients = None
        return None if hidden is None else hidden.to(ctx.dtype), weight, bias, None


response_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = ResponseLoss.apply
