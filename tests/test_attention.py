"""Packed examples see themselves and nothing else, on every architecture of the recipes."""

import pytest
import tiny
import torch

from finetuning import attention
from finetuning.attention import Packing, isolate, packed_as, require_isolation
from finetuning.errors import UserError

LENGTHS = (7, 1, 12, 5)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def flat(lengths=LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and position_ids of a packed batch, (1, T) each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (1, sum(lengths)), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def logits_of(model, ids, positions, lengths) -> torch.Tensor:
    with torch.no_grad(), packed_as(Packing(tuple(lengths), model.device)):
        ids, positions = ids.to(model.device), positions.to(model.device)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float().cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_packed_examples_get_the_logits_they_get_alone(kind, device):
    model = tiny.model_of(kind).to(device)
    ids, positions = flat()
    alone = [model(input_ids=part.to(device)).logits.detach().cpu() for part in ids.split(LENGTHS, dim=1)]
    isolate(model)
    together = logits_of(model, ids, positions, LENGTHS)
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-5 if device == "cpu" else 1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_changing_one_packed_example_changes_no_other(kind, device):
    model = tiny.model_of(kind).to(device)
    isolate(model)
    ids, positions = flat()
    before = logits_of(model, ids, positions, LENGTHS)
    ids[0, 8:20] = torch.randint(5, 500, (12,))  # the third
    after = logits_of(model, ids, positions, LENGTHS)
    assert (before - after)[0, :8].abs().max() < 1e-6
    assert (before - after)[0, 20:].abs().max() < 1e-6
    assert (before - after)[0, 8:20].abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_half_precision_on_a_gpu_isolates_too(kind, dtype):
    model = tiny.model_of(kind).to("cuda", dtype)
    isolate(model)
    require_isolation(model)
    ids, positions = flat()
    before = logits_of(model, ids, positions, LENGTHS)
    ids[0, 8:20] = torch.randint(5, 500, (12,))
    after = logits_of(model, ids, positions, LENGTHS)
    assert torch.equal(before[0, :8], after[0, :8])
    assert torch.equal(before[0, 20:], after[0, 20:])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_flash_kernel_and_padded_rows_give_the_same_gradients(kind, monkeypatch):
    grads = []
    for has_flash in (True, False):
        model = tiny.model_of(kind).to("cuda", torch.bfloat16)
        isolate(model)
        monkeypatch.setattr(attention, "has_flash", lambda query, answer=has_flash: answer)
        ids, positions = flat()
        with packed_as(Packing(LENGTHS, model.device)):
            output = model(input_ids=ids.cuda(), position_ids=positions.cuda(), use_cache=False)
            output.logits.float().logsumexp(-1).sum().backward()
        grads.append(torch.cat([weight.grad.float().flatten() for weight in model.parameters()]))
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 0.05


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_the_real_model_is_asked_and_passes(kind):
    model = tiny.model_of(kind)
    isolate(model)
    assert require_isolation(model) is None  # it raises otherwise


def test_bloom_as_it_is_leaks_and_is_refused():
    with pytest.raises(UserError, match=r"bloom.*see each other.*data\.layout=padded"):
        require_isolation(tiny.model_of("bloom"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_broken_isolation_is_refused(kind, monkeypatch):
    model = tiny.model_of(kind)
    isolate(model)
    one = attention.attend
    whole = lambda query, key, value, packing, *rest: one(  # noqa: E731
        query, key, value, Packing((query.shape[2],), packing.device), *rest
    )
    monkeypatch.setattr(attention, "attend", whole)
    with pytest.raises(UserError, match="see each other"):
        require_isolation(model)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_generation_is_what_it_was(kind):
    model = tiny.model_of(kind)
    ids = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(input_ids=ids, attention_mask=mask, **settings)
    isolate(model)
    assert torch.equal(before, model.generate(input_ids=ids, attention_mask=mask, **settings))


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_checkpointed_layers_attend_in_isolation_when_they_run_again(kind):
    ids, positions = flat()
    grads = []
    for checkpointing in (False, True):
        model = tiny.model_of(kind).train()
        isolate(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with packed_as(Packing(LENGTHS, model.device)):
            model(input_ids=ids, position_ids=positions, use_cache=False).logits.logsumexp(-1).sum().backward()
        grads.append([weight.grad for weight in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)
