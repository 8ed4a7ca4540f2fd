"""Packed examples see themselves and nothing else, on every architecture of the recipes."""

from itertools import pairwise

import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32

from finetuning.budget.gpu_stand_ins import PaddedPacking
from finetuning.errors import UserError
from finetuning.model import attention
from finetuning.model.attention import (
    Packing,
    attend,
    packed_as,
    positions_of,
    require_isolation,
    use_packed_attention,
)
from finetuning.model.response_head import ResponseHead

LENGTHS = (7, 1, 12, 5)
# A window of 8 tokens, in every layer or in some.
WINDOWED = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "phi3": {"sliding_window": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def flat(lengths=LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and position_ids of a packed batch, (1, T) each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (1, sum(lengths)), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def packing_of(lengths, device, way: type[Packing] = Packing) -> Packing:
    return way(tuple(lengths), positions_of(lengths, device))


def logits_of(model, ids, positions, lengths) -> torch.Tensor:
    with torch.no_grad(), packed_as(packing_of(lengths, model.device)):
        ids, positions = ids.to(model.device), positions.to(model.device)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float().cpu()


def computing_in(model, dtype):
    """The model as accelerate prepares it for bf16 or fp16: autocast, and logits in float32."""
    if dtype is not None:
        model.forward = convert_outputs_to_fp32(
            torch.autocast(model.device.type, dtype)(model.forward)
        )
    return model


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


def flash_attention(q, k, v, ends, _, longest, __, dropout, is_causal, ___, **settings):
    left, right = settings["window_size_left"], settings["window_size_right"]
    assert right == 0 and is_causal == (left == -1) and longest == ends.diff().max()
    parts = []
    for start, end in pairwise(ends.tolist()):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= left) | (left == -1))
        rows = (part[start:end].transpose(0, 1)[None] for part in (q, k, v))
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


@pytest.mark.parametrize("kind", [*WINDOWED, "gpt_oss"])
def test_padding_on_the_right_changes_no_logit_of_a_model_with_windows_or_sinks(kind):
    experts = {"sliding_window": 8, "num_local_experts": 4, "head_dim": 8}
    model = tiny.model_of(kind, **WINDOWED.get(kind, experts))
    ids, _ = flat((40,))
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False).logits
        padded = model(input_ids=F.pad(ids, (0, 20)), use_cache=False).logits[:, :40]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_windows_that_the_packed_path_would_drop_are_refused(monkeypatch):
    model = tiny.model_of("mistral", **WINDOWED["mistral"])
    use_packed_attention(model)
    one = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, window: one(*args))
    assert require_isolation(model, longest=8) is None  # no example outgrows the window
    with pytest.raises(UserError, match=r"mistral.*get alone.*data\.layout=padded"):
        require_isolation(model, longest=40)


def test_a_model_that_attends_in_chunks_is_refused_where_an_example_outgrows_them():
    model = tiny.model_of(
        "llama4_text", attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=64
    )
    use_packed_attention(model)
    assert require_isolation(model, longest=8) is None
    with pytest.raises(UserError, match="get alone"):
        require_isolation(model, longest=12)


def test_a_model_whose_attention_is_more_than_sdpa_is_refused():
    model = tiny.model_of("gpt_oss", num_local_experts=4, head_dim=8)
    with pytest.raises(
        UserError, match=r"^data\.layout: packed, but gpt_oss .*eager.*sinks.*data\.layout=padded$"
    ):
        use_packed_attention(model)


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu(capability=(8, 0)), id="bf16"),
        pytest.param(torch.float16, id="fp16"),
    ],
)
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_half_precision_on_a_gpu_isolates_too(kind, dtype):
    model = computing_in(tiny.model_of(kind).to("cuda"), dtype)
    use_packed_attention(model)
    require_isolation(model, is_half=True)
    ids, positions = flat()
    before = logits_of(model, ids, positions, LENGTHS)
    ids[0, 8:20] = torch.randint(5, 500, (12,))
    after = logits_of(model, ids, positions, LENGTHS)
    assert torch.equal(before[0, :8], after[0, :8])
    assert torch.equal(before[0, 20:], after[0, 20:])


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


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_the_real_model_is_asked_and_passes(kind):
    model = tiny.model_of(kind)
    use_packed_attention(model)
    assert require_isolation(model) is None  # it raises otherwise


def test_a_model_is_asked_where_it_computes_and_not_where_its_weights_wait(monkeypatch):
    """Those of FSDP2 with offload wait in main memory."""
    model = tiny.model_of("llama")
    use_packed_attention(model)
    here = model.device
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    assert require_isolation(model, device=here) is None  # it raises otherwise
    assert ResponseHead(model).require_unmodified_logits(model, here) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_model_that_is_asked_under_autocast_may_round_as_autocast_does(kind, dtype):
    model = computing_in(tiny.model_of(kind), dtype)
    use_packed_attention(model)
    assert require_isolation(model, is_half=True) is None  # it raises otherwise


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "std", [0.02, 0.2]
)  # of fresh weights, and of such that tokens matter to each other
def test_bloom_as_it_is_leaks_and_is_refused(std, dtype):
    model = computing_in(tiny.model_of("bloom", width=256, n_layer=8, n_head=8), dtype)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=std)
    with pytest.raises(UserError, match=r"bloom.*get alone.*data\.layout=padded"):
        require_isolation(model, is_half=dtype is not None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_broken_isolation_is_refused(kind, dtype, monkeypatch):
    model = computing_in(tiny.model_of(kind), dtype)
    use_packed_attention(model)
    one = attention.attend
    whole = lambda query, key, value, packing, *rest, window: one(  # noqa: E731
        query, key, value, packing_of((query.shape[2],), query.device), *rest
    )
    monkeypatch.setattr(attention, "attend", whole)
    with pytest.raises(UserError, match="get alone"):
        require_isolation(model, is_half=dtype is not None)


def test_packing_by_transformers_in_the_same_process_is_what_it_was():
    """Restarting positions without a mask: it has to look at them, which ours need not."""
    model = tiny.model_of("llama")
    ids, positions = flat()
    with torch.no_grad():
        alone = [model(input_ids=part).logits for part in ids.split(LENGTHS, dim=1)]
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_generation_is_what_it_was(kind):
    model = tiny.model_of(kind)
    ids = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(input_ids=ids, attention_mask=mask, **settings)
    use_packed_attention(model)
    assert torch.equal(before, model.generate(input_ids=ids, attention_mask=mask, **settings))


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
