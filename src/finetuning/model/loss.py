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
from finetuning.model.last_block import LastBlock
from finetuning.model.lora import require_modules
from finetuning.model.recompute import recompute_cheap_outputs, recomputing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuning.recipe.sections import Lora

TILE_LOGITS = 2**24  # alive at once: 64 MiB in float32
# But no fewer rows: below, a core multiplies a vocabulary of 250,880 a fifth slower.
TILE_ROWS = 128
CLOSE = 0.05  # the loss of logits that were rounded to half precision, and of those that were not
# Fields of a config by which a model caps or scales its logits: Gemma 2's cap, the factor of Cohere
# and the divisor of Granite are part of the loss, those of other models are refused.
CAP, FACTOR, DIVISOR = "final_logit_softcapping", "logit_scale", "logits_scaling"
NEUTRAL = {CAP: None, FACTOR: 1.0, DIVISOR: 1.0}
UNKNOWN = ("logits_soft_cap", "output_logit_soft_cap", "lm_head_multiplier", "output_multiplier")


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


class LogitChange(NamedTuple):
    """What a model does to the logits of its head: x -> cap * tanh(factor * x / cap)."""

    factor: float
    cap: float | None

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "LogitChange":
        config = model.config.get_text_config()
        factor = getattr(config, FACTOR, None) or 1
        divisor = getattr(config, DIVISOR, None) or 1
        return cls(factor / divisor, getattr(config, CAP, None))


Setting = tuple[Any, str, Any]  # (config or module, name, value)


def settings_of_change(model: "PreTrainedModel") -> list[Setting]:
    """Where the model, or its config, says how it changes its logits."""
    owners = [model.config.get_text_config(), *model.modules()]
    return [
        (owner, name, vars(owner)[name])
        for owner in owners
        for name in NEUTRAL
        if vars(owner).get(name) is not None
    ]


@contextmanager
def unchanged(settings: list[Setting]) -> Iterator[None]:
    """Within, the model returns what its head returns: the head does the rest, see LogitChange."""
    for owner, name, _ in settings:
        setattr(owner, name, NEUTRAL[name])
    try:
        yield
    finally:
        for owner, name, value in settings:
            setattr(owner, name, value)


class ResponseHead:
    """A model's output embeddings, made to score targets instead of returning logits.

    The head is still called as the module it is, inside the model's own forward: what DDP, ZeRO-3
    and FSDP2 hook there (gathering its weight, say) they find as ever. While it scores, the model
    computes and keeps only what these targets need: see last_block.py and recompute.py.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        recompute_cheap_outputs(model)
        self.last_block = LastBlock(model)
        self.change, self.settings = LogitChange.of(model), settings_of_change(model)
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
            with recomputing(), self.last_block.at(targets.positions), unchanged(self.settings):
                yield
        finally:
            self.targets = None

    @torch.no_grad()
    def require_unmodified_logits(
        self, model: "PreTrainedModel", device: torch.device | None = None
    ) -> None:
        """Raises UserError for a model that changes the logits its head returns.

        What it returns is then not the loss, and it would silently train with other gradients than
        those of the loss that is logged. `device` is that of require_isolation.
        """
        tokens = torch.arange(5, 13, device=device or model.device)
        was_training = model.training
        model.train(False)
        try:
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
            with self.scoring(Targets(torch.arange(7, device=tokens.device), tokens[1:])):
                returned = model(input_ids=tokens[None], use_cache=False).logits
        finally:
            model.train(was_training)
        expected = F.cross_entropy(logits, tokens[1:], reduction="sum")
        if (
            self.scores is None
            or not torch.equal(returned.float(), self.scores.loss.float())
            or not torch.isclose(self.scores.loss.float(), expected, rtol=CLOSE)
        ):
            kind = model.config.model_type
            raise UserError(
                f"model.name: {kind} models scale, cap or cut their logits, which is not supported"
            )

    def forward(self, head: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.targets is None:
            return F.linear(hidden_states, head.weight, head.bias)
        hidden = hidden_states.flatten(0, -2).index_select(0, self.targets.positions)
        if self.change.factor != 1:
            hidden = hidden * self.change.factor
        loss, correct = response_loss(
            hidden, head.weight, head.bias, self.targets.tokens, self.change.cap
        )
        # Detached: the graph would live until the next batch, with bitsandbytes' activations in it.
        self.scores = Scores(loss.detach(), correct)
        return loss


def require_plain_head(model: "PreTrainedModel", lora: "Lora | None") -> None:
    """Raises UserError where the loss is more than a product with the head's weight.

    That is with logits changed in an unknown way, with a loss that balances experts, and with an
    adapter on the head; and where the adapter would not be what was asked for: see require_modules.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise UserError(
            f"model.name: the config of this {config.model_type} model asks for the loss that "
            "balances its experts (output_router_logits: true), which is not computed here; train "
            "a copy of it whose config.json has output_router_logits: false"
        )
    modified = [name for name in UNKNOWN if getattr(config, name, None) not in (None, 1)]
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
    """hidden (N, C), weight (V, C), bias (V,) or None, tokens (N,), cap or None -> Scores.

    Gradients are added up in float32 whatever the products are in, multiplied by what comes after
    the loss, and only then rounded: with bfloat16 sums 13 tiles are off by 4.4e-3 (float32: 4e-4),
    and in float16 a frequent token overflows that no loss scale can save.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        cap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        device, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        grad_hidden: Any = torch.empty_like(rows, dtype=wide) if needs_hidden else None
        grad_weight: Any = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias: Any = torch.zeros_like(weight[:, 0], dtype=wide) if needs_bias else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        tile_rows = min(max(TILE_ROWS, TILE_LOGITS // len(weight)), max(1, len(rows)))
        buffer = rows.new_empty(tile_rows, aligned(len(weight)))[:, : len(weight)]
        for start in range(0, len(rows), tile_rows):
            tile, wanted = rows[start : start + tile_rows], tokens[start : start + tile_rows, None]
            product = buffer[: len(tile)]
            torch.mm(tile, matrix.t(), out=product)
            if offset is not None:
                product += offset
            grad = product.to(wide)  # in float32 the buffer itself
            slope = None if cap is None else cap_(grad, cap)
            scored = score(grad, wanted)
            if slope is not None:
                grad *= slope
            loss += scored.loss
            correct += scored.correct
            if needs_bias:
                grad_bias += grad.sum(0)
            if dtype != wide:
                grad = product.copy_(grad)  # and the float32 tile is freed
            if needs_hidden:
                grad_hidden[start : start + tile_rows] = grad @ matrix
            if needs_weight:
                add_product(grad_weight, grad.t(), tile, is_first=start == 0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        # Scaled here and not in forward: only now is the factor known (accumulation, fp16's scale).
        factor = grad_outputs[0]
        hidden, weight, bias = (
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return hidden, weight, bias, None, None


response_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = ResponseLoss.apply


def cap_(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Caps logits in place; returns the derivative, 1 - tanh(logits / cap) ** 2."""
    tanh = logits.div_(cap).tanh_()
    slope = 1 - tanh.square()
    logits.mul_(cap)
    return slope


def score(logits: torch.Tensor, wanted: torch.Tensor) -> Scores:
    """logits (N, V), wanted (N, 1). In place, a tile being large, logits become their gradient.

    That is softmax - one-hot.
    """
    of_target = logits.gather(1, wanted)
    top = logits.amax(1, keepdim=True)
    correct = (of_target == top).sum()
    exp = logits.sub_(top).exp_()
    total = exp.sum(1, keepdim=True)
    loss = (total.log() + top - of_target).sum()
    exp.div_(total).scatter_add_(1, wanted, torch.full_like(of_target, -1.0))
    return Scores(loss, correct)


def aligned(columns: int) -> int:
    """From one row of a tile to the next: a multiple of 16 numbers, but none of 1,024.

    Measured: with rows at odd addresses (GPT-2's 50,257 columns) the head takes 1.2 times as long;
    rows a multiple of 4 KiB apart (250,880 columns) share cache sets.
    """
    stride = -(-columns // 16) * 16
    return stride + 16 if stride % 1024 == 0 else stride


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, is_first: bool
) -> None:
    """Adds left @ right, which may be in half precision, to a float32 total; the first overwrites.

    A GPU's kernels multiply half and add float32. A CPU's would round the product, and most CPUs
    emulate half precision: there it is multiplied in float32.
    """
    beta = 0 if is_first else 1
    if left.dtype != total.dtype and total.is_cuda:
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta)
