"""The loss over response positions against torch's own cross-entropy over all logits."""

import pytest
import torch
import torch.nn.functional as F

from finetuning.model import loss
from finetuning.model.loss import ResponseLoss, response_loss


def problem(
    dtype=torch.float64, rows: int = 37, width: int = 16, vocabulary: int = 101, bias: bool = False
):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, generator=generator, requires_grad=True)
    offset = (
        torch.randn(vocabulary, dtype=dtype, generator=generator, requires_grad=True)
        if bias
        else None
    )
    return hidden, weight, offset, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 128])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, rows, bias):
    monkeypatch.setattr(loss, "TILE_LOGITS", 0)
    monkeypatch.setattr(loss, "TILE_ROWS", rows)
    hidden, weight, offset, tokens = problem(bias=bias)
    wanted = F.cross_entropy(F.linear(hidden, weight, offset), tokens, reduction="sum")
    found, correct = ResponseLoss.apply(hidden, weight, offset, tokens)
    given = [part for part in (hidden, weight, offset) if part is not None]
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert correct.item() == (F.linear(hidden, weight, offset).argmax(1) == tokens).sum().item()
    # The factor stands for what follows the loss: tokens of the step, accumulation, fp16's scale.
    for mine, theirs in zip(
        torch.autograd.grad(found * 7, given), torch.autograd.grad(wanted * 7, given), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_no_gradient_is_formed_for_what_is_frozen(frozen):
    hidden, weight, _, tokens = problem()
    parts = {"hidden": hidden, "weight": weight}
    parts[frozen] = parts[frozen].detach()
    total, _ = ResponseLoss.apply(parts["hidden"], parts["weight"], None, tokens)
    total.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_a_batch_without_targets_costs_nothing_and_still_has_gradients():
    hidden, weight, _, tokens = problem(rows=0)
    total, correct = ResponseLoss.apply(hidden, weight, None, tokens)
    total.backward()
    assert (total.item(), correct.item()) == (0, 0)
    assert weight.grad.abs().sum() == 0


def test_under_autocast_the_products_are_in_half_precision_and_the_loss_is_not():
    hidden, weight, _, tokens = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = ResponseLoss.apply(hidden, weight, None, tokens)
    total.backward()
    wanted = F.cross_entropy(hidden.detach() @ weight.detach().t(), tokens, reduction="sum")
    assert total.dtype == weight.grad.dtype == hidden.grad.dtype == torch.float32
    assert total.item() == pytest.approx(wanted.item(), rel=2e-2)
    assert total.item() != pytest.approx(wanted.item(), rel=1e-6)


def gradient_error(dtype: torch.dtype, scale: float = 1.0) -> float:
    """Of the head's weight, in many tiles, as a share of its norm; hidden states have an
    outlier."""
    hidden, weight, _, tokens = problem(torch.float32, rows=4096, width=32, vocabulary=512)
    tokens[: len(tokens) // 10] = 7
    half = hidden.detach().to(dtype), weight.detach().mul(0.1).to(dtype).requires_grad_()
    total, _ = ResponseLoss.apply(half[0], half[1], None, tokens)
    (total * (scale / len(tokens))).backward()
    exact = half[1].detach().double().requires_grad_()
    F.cross_entropy(half[0].double() @ exact.t(), tokens, reduction="sum").backward()
    wanted = exact.grad * (scale / len(tokens))
    return ((half[1].grad.double() - wanted).norm() / wanted.norm()).item()


def test_gradients_in_bfloat16_are_added_up_in_float32(monkeypatch):
    monkeypatch.setattr(loss, "TILE_LOGITS", 0)  # 32 tiles; bfloat16 sums are off by 1e-2
    assert gradient_error(torch.bfloat16) < 5e-3


def test_a_frequent_token_overflows_no_float16_sum_that_a_loss_scale_could_save():
    hidden, weight, _, tokens = problem(torch.float32, rows=4096, width=16, vocabulary=512)
    hidden = hidden.detach().half()
    hidden[:, 0] = 250.0
    tokens[:400] = 7
    weight = weight.detach().mul(0.02).half().requires_grad_()
    total, _ = ResponseLoss.apply(hidden, weight, None, tokens)
    (total / len(tokens)).backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("columns", [101, 50257, 1024, 250880, 64])
def test_rows_of_a_tile_begin_at_aligned_addresses(columns):
    assert columns <= loss.aligned(columns) <= columns + 31
    assert loss.aligned(columns) % 16 == 0 != loss.aligned(columns) % 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_capped_logits_are_autograds(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16, dtype=dtype), torch.randn(300, 16, dtype=dtype)
    tokens = torch.randint(300, (40,))
    found = [part.clone().requires_grad_() for part in (hidden, weight)]
    loss, _ = response_loss(*found, None, tokens, 3.0)
    loss.backward()
    exact = [part.double().requires_grad_() for part in (hidden, weight)]
    capped = 3 * torch.tanh(exact[0] @ exact[1].T / 3)
    expected = F.cross_entropy(capped, tokens, reduction="sum")
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm()


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(
    "dtype, scale, tolerance", [(torch.float64, 1.0, 1e-12), (torch.float16, 1e6, 1e-2)]
)
def test_the_loss_and_gradients_of_groups_are_autograds(
    monkeypatch, dtype, scale, tolerance, is_frozen
):
    """Each group of targets has a factor that is known only afterwards; times the scale, it is too
    large for float16, which the gradients are not.
    """
    monkeypatch.setattr(loss, "TILE_LOGITS", 0)
    monkeypatch.setattr(loss, "TILE_ROWS", 7)  # tiles that begin and end within groups
    hidden, weight, _, tokens = problem(dtype)
    found = [(part.detach() / 100).requires_grad_() for part in (hidden, weight)]
    found[1].requires_grad_(not is_frozen)
    exact = [part.detach().double().requires_grad_() for part in found]
    counts, factors = torch.tensor([5, 0, 21, 11]), torch.tensor([1.0, 9.0, -0.5, 0.0])
    sums, _ = response_loss(*found, None, tokens, None, counts)
    each = F.cross_entropy(exact[0] @ exact[1].T, tokens, reduction="none")
    expected = torch.stack([part.sum() for part in each.split(counts.tolist())])
    torch.testing.assert_close(sums.double(), expected, rtol=tolerance, atol=tolerance)
    (sums * factors.to(sums) * scale).sum().backward()
    (expected * factors * scale).sum().backward()
    for ours, theirs in zip(found, exact, strict=True):
        if ours.requires_grad:
            largest = theirs.grad.abs().max()
            assert (ours.grad.double() - theirs.grad).abs().max() <= tolerance * largest
