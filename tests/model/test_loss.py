"""The loss over response positions against torch's own cross-entropy over all logits."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning.errors import UserError
from finetuning.model import loss
from finetuning.model.loss import (
    ResponseHead,
    ResponseLoss,
    Targets,
    require_plain_head,
    response_loss,
)
from finetuning.recipe.sections import Lora


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
def test_rows_of_a_tile_lie_at_aligned_addresses(columns):
    assert columns <= loss.aligned(columns) <= columns + 31
    assert loss.aligned(columns) % 16 == 0 != loss.aligned(columns) % 1024


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_scoring_head_gives_the_loss_and_otherwise_logits(kind):
    model = tiny.model_of(kind)
    ids = torch.randint(5, 500, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits
    head = ResponseHead(model)
    positions, tokens = torch.tensor([3, 4, 9, 16]), ids.flatten()[[4, 5, 10, 17]]
    with head.scoring(Targets(positions, tokens)):
        total = model(input_ids=ids, use_cache=False).logits
    wanted = F.cross_entropy(logits.flatten(0, 1)[positions], tokens, reduction="sum")
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_an_adapter_on_the_head_is_refused(field):
    with pytest.raises(UserError, match="lm_head"):
        require_plain_head(tiny.model_of("llama"), Lora(**{field: ["lm_head"]}))


@pytest.mark.parametrize(
    ("kind", "fields", "complaint"),
    [
        (
            "gpt2",
            {"target_modules": ["c_attn", "c_porj"]},
            "target_modules: no module .* is called c_porj; did .* c_proj?",
        ),
        (
            "gpt2",
            {"target_modules": ["attn"], "exclude_modules": ["mpl.c_fc"]},
            "exclude_modules: .* did you mean c_fc?",
        ),
        ("llama", {"target_modules": ["proj"]}, "called proj; did you mean [a-z]+_proj?"),
        (
            "gpt2",
            {"trainable_token_indices": [5, 6]},
            "trainable_token_indices: the gpt2 model's output layer has",
        ),
        (
            "bloom",
            {"trainable_token_indices": {"word_embeddings": [5]}},
            "trainable_token_indices: the bloom model",
        ),
        ("llama", {"trainable_token_indices": {"lm_head": [5]}}, "lm_head cannot be adapted"),
    ],
)
def test_an_adapter_that_would_not_be_what_was_asked_for_is_refused(kind, fields, complaint):
    with pytest.raises(UserError, match=f"^lora.*{complaint}"):
        require_plain_head(tiny.model_of(kind), Lora(**fields))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (
            "gpt2",
            {
                "target_modules": ["c_attn", "mlp.c_proj", "transformer.h.0.mlp.c_fc"],
                "exclude_modules": ["h.1.attn"],
            },
        ),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": r".*\.(q|k)_proj", "trainable_token_indices": [5, 6]}),
        ("bloom", {}),
    ],
)
def test_modules_are_named_by_the_end_of_their_path_or_by_a_pattern(kind, fields):
    require_plain_head(tiny.model_of(kind), Lora(**fields))


def test_the_old_names_of_a_mixture_s_experts_are_left_to_peft():
    config = AutoConfig.for_model(
        "mixtral", num_local_experts=4, vocab_size=300, **tiny.CONFIGS["llama"]
    )
    model, names = AutoModelForCausalLM.from_config(config), ["q_proj", "w1", "w2", "w3"]
    require_plain_head(model, Lora(target_modules=names))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names))
    assert any(
        "experts" in name for name, weight in adapted.named_parameters() if weight.requires_grad
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe", "mixtral"])
def test_a_config_that_asks_for_balanced_experts_is_refused(kind):
    experts = "num_local_experts" if kind == "mixtral" else "num_experts"
    model = tiny.model_of(kind, **{experts: 4}, output_router_logits=True)
    with pytest.raises(UserError, match=rf"^model\.name: .* {kind} .*output_router_logits: false$"):
        require_plain_head(model, None)
    model.config.output_router_logits = False
    require_plain_head(model, None)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_the_head_has_the_last_word(kind):
    model = tiny.model_of(kind)
    ResponseHead(model).require_unmodified_logits(model)  # it raises otherwise


def test_a_model_that_changes_what_its_head_returns_is_refused():
    """Gradients would be those of a capped loss: zero where it is large."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = AutoConfig.for_model("recurrent_gemma", vocab_size=300, lru_width=32, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="logits_soft_cap"):
        require_plain_head(model, None)
    with pytest.raises(UserError, match="recurrent_gemma models scale, cap or cut their logits"):
        ResponseHead(model).require_unmodified_logits(model)


def test_a_factor_that_the_model_does_not_apply_is_noticed():
    model = tiny.model_of("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(UserError, match="llama models scale, cap or cut their logits"):
        ResponseHead(model).require_unmodified_logits(model)


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
