"""Hidden states -> loss over response tokens, without the logits of any other token.

The head's weight and the cross-entropy meet in tiles of a few rows: no (B, T, V) logits exist. The
gradient is formed while a tile's logits are at hand, so that backward has nothing to compute again:
three matrix products, two with a frozen head, where recomputing takes four and three. Preference
tuning asks the same head for the loss of each of several groups of tokens. The idea is that of
Liger's fused linear cross-entropy (https://github.com/linkedin/Liger-Kernel), here in plain
torch for every device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from finetuning.model.tied_weight import HeadGradient

TILE_LOGITS = 2**24  # alive at once: 64 MiB in float32
# But no fewer rows: below, a core multiplies a vocabulary of 250,880 a fifth slower.
TILE_ROWS = 128


class Scores(NamedTuple):
    loss: torch.Tensor
    """() cross-entropy, summed over the N targets; (G,) summed over those of each group"""
    correct: torch.Tensor
    """() how many targets are the likeliest token"""


class ResponseLoss(torch.autograd.Function):
    """hidden (N, C), weight (V, C), bias (V,) or None, tokens (N,), cap or None, counts -> Scores.

    With `left`, the weight's gradient is left there, in float32, instead of being returned.

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
        left: HeadGradient | None = None,
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
        ctx.cap, ctx.dtype, ctx.counts, ctx.left = cap, dtype, counts, left
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
        elif ctx.counts is not None and gradients.hidden is not None:
            factor = of_each_target(factor, ctx.counts, len(gradients.hidden))
        # Scaled here and not in forward: only now is it known (accumulation, fp16's scale).
        scaled = gradients.scaled(factor)
        if ctx.left is not None:
            ctx.left.value = scaled.weight
            scaled = scaled._replace(weight=None)
        rounded = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(scaled, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return (*rounded, None, None, None, None)


response_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = ResponseLoss.apply


def of_each_target(factor: torch.Tensor, counts: torch.Tensor, targets: int) -> torch.Tensor:
    """(N, 1) the factor of each target's group."""
    return factor.repeat_interleave(counts, output_size=targets)[:, None]


class Gradients(NamedTuple):
    """Of hidden, weight and bias, added up tile by tile; None where none is needed.

    In float32 whatever the products are in: with bfloat16 sums 13 tiles are off by 4.4e-3 (float32:
    4e-4), and in float16 a frequent token overflows that no loss scale can save.
    """

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def blank(
        cls, hidden: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool], dtype: torch.dtype
    ) -> "Gradients":
        of_hidden, of_weight, of_bias = needs
        fill = torch.empty_like if len(hidden) else torch.zeros_like  # the first tile overwrites
        return cls(
            torch.empty_like(hidden, dtype=dtype) if of_hidden else None,
            fill(weight, dtype=dtype) if of_weight else None,
            torch.zeros_like(weight[:, 0], dtype=dtype) if of_bias else None,
        )

    def scaled(self, factor: torch.Tensor) -> "Gradients":
        """These, multiplied in place."""
        return Gradients(*(x if x is None else x.mul_(factor) for x in self))

    def add(
        self, part: slice, of_logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Adds what the gradient of a tile's logits (n, V) means for hidden[part] and weight."""
        if self.hidden is not None:
            self.hidden[part] = of_logits @ weight
        if self.weight is not None:
            add_product(self.weight, of_logits.t(), hidden[part], is_first=part.start == 0)


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
    sum, in which each target counts by its factor (N, 1), 1 if not given. Products are in dtype.
    """
    rows, matrix = hidden.to(dtype), weight.to(dtype)
    offset = None if bias is None else bias.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    gradients = Gradients.blank(rows, weight, needs, wide)
    losses = torch.empty(len(rows), dtype=wide, device=hidden.device)
    correct = torch.zeros((), dtype=torch.long, device=hidden.device)
    for part, logits in tiles(rows, matrix, offset):
        factor = None if factors is None else factors[part]
        scores = score_tile(logits, tokens[part, None], cap, factor, gradients.bias)
        losses[part] = scores.loss
        correct += scores.correct
        gradients.add(part, logits, rows, matrix)
    return losses, correct, gradients


def tiles(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(which rows of hidden, their logits (n, V)), one tile after another in the same memory."""
    vocabulary = len(weight)
    height = min(max(TILE_ROWS, TILE_LOGITS // vocabulary), max(1, len(hidden)))
    buffer = hidden.new_empty(height, aligned(vocabulary))[:, :vocabulary]
    for start in range(0, len(hidden), height):
        part = slice(start, start + height)
        rows = hidden[part]
        logits = buffer[: len(rows)]
        torch.mm(rows, weight.t(), out=logits)
        if bias is not None:
            logits += bias
        yield part, logits


def score_tile(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    cap: float | None,
    factor: torch.Tensor | None,
    bias_gradient: torch.Tensor | None,
) -> Scores:
    """Scores of each target, wanted (n, 1); logits (n, V) become their gradient, in place."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    grad = logits.to(wide)  # in float32 the logits themselves
    slope = None if cap is None else cap_(grad, cap)
    scores = score(grad, wanted)
    if slope is not None:
        grad *= slope
    if factor is not None:
        grad *= factor
    if bias_gradient is not None:
        bias_gradient += grad.sum(0)
    if grad is not logits:
        logits.copy_(grad)
    return scores


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
