"""A model whose packed examples would see each other is refused, the others are not."""

import pytest
import tiny
import torch
from packed_batches import LENGTHS, WINDOWED, computing_in, flat, logits_of, packing_of

from finetuning.errors import UserError
from finetuning.model import packed_models
from finetuning.model.isolation import require_isolation
from finetuning.model.packed_models import use_packed_attention
from finetuning.model.packing import Packing
from finetuning.model.response_head import ResponseHead


def test_windows_that_the_packed_path_would_drop_are_refused(monkeypatch):
    model = tiny.model_of("mistral", **WINDOWED["mistral"])
    use_packed_attention(model)
    one = packed_models.attend
    monkeypatch.setattr(packed_models, "attend", lambda *args, window: one(*args))
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


@pytest.mark.parametrize("are_pairs", [False, True])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_the_real_model_is_asked_and_passes(kind, are_pairs):
    model = tiny.model_of(kind)
    use_packed_attention(model)
    assert require_isolation(model, are_pairs=are_pairs) is None  # it raises otherwise


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_pair_whose_second_response_does_not_see_the_prompt_is_refused(kind, monkeypatch):
    model = tiny.model_of(kind)
    use_packed_attention(model)
    monkeypatch.setattr(Packing, "attended", lambda packing, tokens: tokens)
    monkeypatch.setattr(Packing, "key_lengths", property(lambda packing: packing.lengths))
    assert require_isolation(model) is None
    with pytest.raises(UserError, match="get alone"):
        require_isolation(model, are_pairs=True)


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
    one = packed_models.attend
    whole = lambda query, key, value, packing, *rest, window: one(  # noqa: E731
        query, key, value, packing_of((query.shape[2],), query.device), *rest
    )
    monkeypatch.setattr(packed_models, "attend", whole)
    with pytest.raises(UserError, match="get alone"):
        require_isolation(model, is_half=dtype is not None)
