"""Hidden states -> loss over response tokens, without the logits of any other token.

The head's weight and the cross-entropy meet in tiles of a few rows: no (B, T, V) logits exist. The
gradient is formed while a tile's logits are at hand, so that backward has nothing to compute again:
three matrix products, two with a frozen head, where recomputing takes four and three. Preference
tuning asks the same head for the loss of each of several groups of tokens. The idea is that of
Liger's fused linear cross-entropy (https://github.com/linkedin/Liger-Kernel), here in plain
torch for every device.
"""

import types
from collections.abc import Callable, Iterator, Sequence
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
    counts: torch.Tensor | None = None
    """(G,) targets of each group of them, one group after another, whose losses are added up; None:
    all N are one group"""


class Scores(NamedTuple):
    loss: torch.Tensor
    """() cross-entropy, summed over the N targets; (G,) summed over those of each group"""
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
        """Within, the model's `logits` are Scores.loss of the targets."""
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
        _, tokens, counts = self.targets
        loss, correct = response_loss(
            hidden, head.weight, head.bias, tokens, self.change.cap, counts
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
    """hidden (N, C), weight (V, C), bias (V,) or None, tokens (N,), cap or None, counts -> Scores.

    Gradients are multiplied by what comes after the loss, and only then rounded. One factor for all
    targets can wait until backward, and so can one for each row of hidden. A weight's gradient adds
    the rows up: with a factor for each group, tiles are computed again when the factors are known.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        cap: float | None = None,
        counts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.needs, dtype = ctx.needs_input_grad[:3], weight.dtype
        if torch.is_autocast_enabled(device := hidden.device.type):
            dtype = torch.get_autocast_dtype(device)
        ctx.is_late = counts is not None and any(ctx.needs[1:])
        needs = (False, False, False) if ctx.is_late else ctx.needs
        losses, correct, ctx.gradients = score_tiles(
            hidden, weight, bias, tokens, cap, dtype, needs
        )
        if ctx.is_late:
            ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.cap, ctx.dtype, ctx.counts = cap, dtype, counts
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(correct)
        if counts is None:
            return losses.sum(), correct
        # Not index_add: on a GPU its order, and so its rounding, changes from call to call.
        return torch.segment_reduce(losses, "sum", lengths=counts, unsafe=True), correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        factor, gradients = grad_outputs[0], ctx.gradients
        if ctx.is_late:
            hidden, weight, bias, tokens = ctx.saved_tensors
            # Of 1 at most in the tiles, which may be in float16; all of them once more at the end.
            largest = factor.abs().max().clamp(min=torch.finfo(factor.dtype).tiny)
            shares = of_each_target(factor / largest, ctx.counts, len(tokens))
            _, _, gradients = score_tiles(
                hidden, weight, bias, tokens, ctx.cap, ctx.dtype, ctx.needs, shares
            )
            factor = largest
        elif ctx.counts is not None and gradients[0] is not None:
            factor = of_each_target(factor, ctx.counts, len(gradients[0]))
        # Scaled here and not in forward: only now is it known (accumulation, fp16's scale).
        gradients = [None if each is None else each.mul_(factor) for each in gradients]
        ctx.gradients = None
        rounded = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*rounded, None, None, None)


response_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = ResponseLoss.apply


def of_each_target(factor: torch.Tensor, counts: torch.Tensor, targets: int) -> torch.Tensor:
    """(N, 1) the factor of each target's group."""
    return factor.repeat_interleave(counts, output_size=targets)[:, None]


Gradients = list[torch.Tensor | None]  # of hidden, weight and bias; None where none is needed


def score_tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    cap: float | None,
    dtype: torch.dtype,
    needs: Sequence[bool],
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """(N,) cross-entropy of each target; () how many are the likeliest token; the gradients of the
    sum, in which each target counts by its factor (N, 1), 1 if not given.

    Gradients are added up in float32 whatever the products are in: with bfloat16 sums 13 tiles are
    off by 4.4e-3 (float32: 4e-4), and in float16 a frequent token overflows that no loss scale can
    save.
    """
    needs_hidden, needs_weight, needs_bias = needs
    rows, matrix = hidden.to(dtype), weight.to(dtype)
    offset = None if bias is None else bias.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    grad_hidden: Any = torch.empty_like(rows, dtype=wide) if needs_hidden else None
    grad_weight: Any = torch.zeros_like(weight, dtype=wide) if needs_weight else None
    grad_bias: Any = torch.zeros_like(weight[:, 0], dtype=wide) if needs_bias else None
    losses = torch.empty(len(rows), dtype=wide, device=hidden.device)
    correct = torch.zeros((), dtype=torch.long, device=hidden.device)
    tile_rows = min(max(TILE_ROWS, TILE_LOGITS // len(weight)), max(1, len(rows)))
    buffer = rows.new_empty(tile_rows, aligned(len(weight)))[:, : len(weight)]
    for start in range(0, len(rows), tile_rows):
        part = slice(start, start + tile_rows)
        tile, wanted = rows[part], tokens[part, None]
        product = buffer[: len(tile)]
        torch.mm(tile, matrix.t(), out=product)
        if offset is not None:
            product += offset
        grad = product.to(wide)  # in float32 the buffer itself
        slope = None if cap is None else cap_(grad, cap)
        scored = score(grad, wanted)
        losses[part] = scored.loss
        correct += scored.correct
        if slope is not None:
            grad *= slope
        if factors is not None:
            grad *= factors[part]
        if needs_bias:
            grad_bias += grad.sum(0)
        if dtype != wide:
            grad = product.copy_(grad)  # and the float32 tile is freed
        if needs_hidden:
            grad_hidden[part] = grad @ matrix
        if needs_weight:
            add_product(grad_weight, grad.t(), tile, is_first=start == 0)
    return losses, correct, [grad_hidden, grad_weight, grad_bias]


def cap_(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Caps logits in place; returns the derivative, 1 - tanh(logits / cap) ** 2."""
    tanh = logits.div_(cap).tanh_()
    slope = 1 - tanh.square()
    logits.mul_(cap)
    return slope


def score(logits: torch.Tensor, wanted: torch.Tensor) -> Scores:
    """logits (N, V), wanted (N, 1) -> the loss of each target (N,).

    In place, a tile being large, logits become their gradient, which is softmax - one-hot.
    """
    of_target = logits.gather(1, wanted)
    top = logits.amax(1, keepdim=True)
    correct = (of_target == top).sum()
    exp = logits.sub_(top).exp_()
    total = exp.sum(1, keepdim=True)
    loss = (total.log() + top - of_target)[:, 0]
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
