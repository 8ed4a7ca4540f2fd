"""The gradient of a weight that is embedding and output layer, made in one piece."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from finetuning.model.response_head import ResponseHead, Targets

IDS = torch.randint(5, 500, (2, 9), generator=torch.Generator().manual_seed(1))
POSITIONS, TOKENS = torch.tensor([3, 4, 9, 16]), torch.tensor([7, 9, 7, 300])
GEMMA = {"head_dim": 8, "sliding_window": 16}  # its embedding is a class of its own, and scales


def model_of(kind: str, **fields: object):
    model = tiny.model_of(kind, **{**(GEMMA if "gemma" in kind else {}), **fields})
    model.get_input_embeddings().padding_idx = None
    return model.train()


def weight_of(model) -> torch.nn.Parameter:
    return model.get_input_embeddings().weight


def stock(model, times: int = 1) -> torch.Tensor:
    """The weight's gradient by autograd's own two."""
    for _ in range(times):
        logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[POSITIONS]
        F.cross_entropy(logits.float(), TOKENS, reduction="sum").backward()
    return weight_of(model).grad


def ours(model, times: int = 1, **inputs: torch.Tensor) -> torch.Tensor:
    head = ResponseHead(model)
    for _ in range(times):
        with head.scoring(Targets(POSITIONS, TOKENS)):
            loss = model(**(inputs or {"input_ids": IDS}), use_cache=False).logits
        loss.backward()
    return weight_of(model).grad


class AsLargeAsTheWeight(TorchDispatchMode):
    """Names the operations that make a tensor of the weight's shape."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.names = weight.shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        is_whole = isinstance(output, torch.Tensor) and output.shape == self.shape
        if is_whole and not func.is_view and not func._schema.is_mutable:
            self.names.append(func._schema.name.removeprefix("aten::"))
        return output


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "gemma2", "gemma3_text"])
def test_the_gradient_is_autograd_s_and_made_once(kind):
    odd = {"vocab_size": 503}  # no other weight is as large
    expected, model = stock(model_of(kind, **odd)), model_of(kind, **odd)
    assert weight_of(model) is model.get_output_embeddings().weight
    with AsLargeAsTheWeight(weight_of(model)) as large:
        found = ours(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert large.names == ["empty_like"]


def test_gradients_of_micro_batches_are_added():
    expected = stock(model_of("gpt2"), times=3)
    torch.testing.assert_close(ours(model_of("gpt2"), times=3), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_in_half_precision_is_rounded_once():
    exact = stock(model_of("gpt2"))
    theirs, found = stock(model_of("gpt2").bfloat16()), ours(model_of("gpt2").bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 1.05 * (theirs - exact).norm()


def test_a_weight_of_its_own_and_a_frozen_one_are_left_alone():
    model = model_of("llama")
    assert weight_of(model) is not model.get_output_embeddings().weight
    expected = stock(model_of("llama"))
    torch.testing.assert_close(ours(model), expected, rtol=1e-4, atol=1e-5)
    frozen = model_of("gpt2")
    weight_of(frozen).requires_grad_(False)
    assert ours(frozen) is None


def test_an_embedding_that_ignores_a_token_keeps_doing_so():
    models = [model_of("gpt2"), model_of("gpt2")]
    for model in models:
        model.get_input_embeddings().padding_idx = int(IDS[0, 0])
    expected = stock(models[0])
    torch.testing.assert_close(ours(models[1]), expected, rtol=1e-4, atol=1e-5)
    all_tokens = stock(model_of("gpt2"))
    assert not torch.allclose(all_tokens, expected)


def test_where_no_token_is_looked_up_the_head_returns_its_gradient():
    model = model_of("gpt2")
    vectors = F.embedding(IDS, weight_of(model)).detach()
    found = ours(model, inputs_embeds=vectors)
    other = model_of("gpt2")
    logits = other(inputs_embeds=vectors, use_cache=False).logits.flatten(0, 1)[POSITIONS]
    F.cross_entropy(logits, TOKENS, reduction="sum").backward()
    torch.testing.assert_close(found, weight_of(other).grad, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_not_scored_has_autograd_s_gradient():
    model = model_of("gpt2")
    ResponseHead(model)
    assert torch.equal(stock(model), stock(model_of("gpt2")))
