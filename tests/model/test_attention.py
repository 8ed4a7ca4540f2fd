"""Packed examples see themselves and nothing else, on every architecture of the recipes."""

from itertools import pairwise

import pytest
import tiny
import torch
import torch.nn.functional as F
from packed_batches import LENGTHS, WINDOWED, computing_in, flat, logits_of, packing_of

from finetuning.budget.gpu_stand_ins import PaddedPacking
from finetuning.model import attention
from finetuning.model.attention import attend
from finetuning.model.isolation import require_isolation
from finetuning.model.packed_models import use_packed_attention
from finetuning.model.packing import Packing, pack, packed_as

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_packed_examples_get_the_logits_they_get_alone(kind, device):
    model = tiny.model_of(kind).to(device)
    ids, positions = flat()
    alone = [
        model(input_ids=part.to(device)).logits.detach().cpu() for part in ids.split(LENGTHS, dim=1)
    ]
    use_packed_attention(model)
    together = logits_of(model, ids, positions, LENGTHS)
    torch.testing.assert_close(
        together, torch.cat(alone, dim=1), rtol=0, atol=1e-5 if device == "cpu" else 1e-3
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_changing_one_packed_example_changes_no_other(kind, device):
    model = tiny.model_of(kind).to(device)
    use_packed_attention(model)
    ids, positions = flat()
    before = logits_of(model, ids, positions, LENGTHS)
    ids[0, 8:20] = torch.randint(5, 500, (12,))  # the third
    after = logits_of(model, ids, positions, LENGTHS)
    assert (before - after)[0, :8].abs().max() < 1e-6
    assert (before - after)[0, 20:].abs().max() < 1e-6
    assert (before - after)[0, 8:20].abs().max() > 1e-2


@pytest.fixture(params=["one by one", "padded rows", "kernel"])
def way(request, monkeypatch) -> type[Packing]:
    """Each way to attend, on the CPU: the kernel is ours, by the manual of varlen_attn."""
    if request.param == "kernel":
        monkeypatch.setattr(attention, "has_flash", lambda *_: True)
        monkeypatch.setattr(attention, "flash_attention", flash_attention)
    return PaddedPacking if request.param == "padded rows" else Packing


def flash_attention(q, k, v, ends, key_ends, *others, **settings):
    longest, longest_keys, _, is_causal, _ = others
    left, right = settings["window_size_left"], settings["window_size_right"]
    assert right == 0 and is_causal == (left == -1)
    assert (longest, longest_keys) == (ends.diff().max(), key_ends.diff().max())
    parts = []
    for (start, end), (first, last) in zip(
        pairwise(ends.tolist()), pairwise(key_ends.tolist()), strict=True
    ):
        at = torch.arange(last - first)
        distance = at[start - end :, None] - at  # of the last query, the last key is its own
        seen = (distance >= 0) & ((distance <= left) | (left == -1))
        pieces = q[start:end], k[first:last], v[first:last]
        rows = (piece.transpose(0, 1)[None] for piece in pieces)
        output = F.scaled_dot_product_attention(
            *rows, attn_mask=seen, scale=settings["scale"], enable_gqa=True
        )
        parts.append(output[0].transpose(0, 1))
    return (torch.cat(parts),)


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_packed_example_longer_than_the_window_sees_the_window(kind, way):
    model = tiny.model_of(kind, **WINDOWED[kind])
    lengths = (40, 3, 12, 8)
    ids, positions = flat(lengths)
    alone = [model(input_ids=part).logits.detach() for part in ids.split(lengths, dim=1)]
    use_packed_attention(model)
    with torch.no_grad(), packed_as(packing_of(lengths, model.device, way)):
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-5)
    assert require_isolation(model, longest=40) is None  # it raises otherwise


@pytest.mark.parametrize("kind", [*tiny.CONFIGS, *WINDOWED])
def test_an_example_attends_to_a_beginning_that_stands_in_the_one_before(kind, way):
    """As the second response of a pair does. Gradients, too: both add to those of the beginning."""
    model = tiny.model_of(kind, **WINDOWED.get(kind, {}))
    lengths, shared = (15, 12, 7, 20), (0, 11, 0, 3)
    ids, _ = flat(lengths)
    one, two, three, four = ids.split(lengths, dim=1)
    whole = one, torch.cat([one[:, :11], two], 1), three, torch.cat([three[:, :3], four], 1)
    alone = [model(input_ids=each).logits[:, -n:] for each, n in zip(whole, lengths, strict=True)]
    expected, gradients = logits_and_gradients(model, alone)
    use_packed_attention(model)
    packing = way(**vars(pack(lengths, model.device, shared)))
    with packed_as(packing):
        positions = packing.position_ids
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        found = logits_and_gradients(model, [together])
    torch.testing.assert_close(found, (expected, gradients), rtol=0, atol=1e-5)


def logits_and_gradients(model, parts):
    """(1, T, V) and those of the weights, of a sum in which each logit has its own weight."""
    logits = torch.cat(parts, dim=1)
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    gradients = torch.autograd.grad((logits * weights).mean(), list(model.parameters()))
    return logits.detach(), gradients


@pytest.mark.parametrize("kind", [*WINDOWED, "gpt_oss"])
def test_padding_on_the_right_changes_no_logit_of_a_model_with_windows_or_sinks(kind):
    experts = {"sliding_window": 8, "num_local_experts": 4, "head_dim": 8}
    model = tiny.model_of(kind, **WINDOWED.get(kind, experts))
    ids, _ = flat((40,))
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False).logits
        padded = model(input_ids=F.pad(ids, (0, 20)), use_cache=False).logits[:, :40]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_what_attends_under_autocast_is_half_precision_as_the_kernel_needs_it(kind, monkeypatch):
    """As a recipe trains: float32 weights. Rotary positions make float32 of queries and keys."""
    asked = []
    monkeypatch.setattr(attention, "has_flash", lambda query, _: asked.append(query.dtype))
    model = tiny.model_of(kind).train()
    use_packed_attention(model)
    ids, positions = flat()
    with packed_as(packing_of(LENGTHS, model.device)), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert asked == (
        [] if kind == "bloom" else [torch.bfloat16] * 2
    )  # BLOOM has a bias, which no kernel takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bloom", "mistral"])
def test_all_layers_keep_one_and_the_same_mask_for_backward(kind, dtype):
    model = tiny.model_of(kind, **WINDOWED.get(kind, {})).train()
    use_packed_attention(model)
    ids, positions = flat()
    packing = packing_of(LENGTHS, model.device)
    kept = []
    keeping = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept)
    with packed_as(packing), keeping, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    (mask,) = packing.masks.values()
    assert mask.dtype == dtype and mask.isinf().any()
    masks = [tensor for tensor in kept if tensor.dim() == 4 and tensor.isinf().any()]
    assert (
        len(masks) == 2 * 3
    )  # layers, and examples of more than one token: each keeps a part of the one
    assert {tensor.untyped_storage().data_ptr() for tensor in masks} == {
        mask.untyped_storage().data_ptr()
    }


def test_attention_under_autocast_rounds_as_sdpa_does():
    query, key, value = torch.randn(3, 1, 4, 12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(query, key, value.bfloat16(), packing_of((12,), query.device), scale=None)
        theirs = F.scaled_dot_product_attention(query, key, value.bfloat16(), is_causal=True)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


@pytest.mark.gpu(capability=(8, 0))
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_the_flash_kernel_and_padded_rows_give_the_same_gradients(kind, monkeypatch):
    grads, taken = [], []
    flash = attention.attend_flash
    monkeypatch.setattr(attention, "attend_flash", lambda *args: taken.append(args) or flash(*args))
    lengths = (40, 3, 12, 8)
    ids, positions = flat(lengths)
    for has_flash in (attention.has_flash, lambda *_: False):
        model = computing_in(
            tiny.model_of(kind, **WINDOWED.get(kind, {})).to("cuda"), torch.bfloat16
        )
        use_packed_attention(model)
        monkeypatch.setattr(attention, "has_flash", has_flash)
        with packed_as(packing_of(lengths, model.device)):
            output = model(input_ids=ids.cuda(), position_ids=positions.cuda(), use_cache=False)
            output.logits.float().logsumexp(-1).sum().backward()
        grads.append(torch.cat([weight.grad.float().flatten() for weight in model.parameters()]))
    assert len(taken) == 2  # layers, of the first model
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 0.05


@pytest.mark.parametrize("kind", [*tiny.CONFIGS, "mistral"])
def test_checkpointed_layers_attend_in_isolation_when_they_run_again(kind):
    ids, positions = flat()
    grads = []
    for checkpointing in (False, True):
        model = tiny.model_of(kind, **WINDOWED.get(kind, {})).train()
        use_packed_attention(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with packed_as(packing_of(LENGTHS, model.device)):
            model(input_ids=ids, position_ids=positions, use_cache=False).logits.logsumexp(
                -1
            ).sum().backward()
        grads.append([weight.grad for weight in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)
