"""A step computes and keeps only what it must: the same losses and gradients as without that."""

from contextlib import nullcontext

import fake_cuda
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode

from finetuning.budget.storage_tracker import StorageTracker
from finetuning.model import response_head
from finetuning.model.last_block import LastBlock
from finetuning.model.loading import fuse_gelu
from finetuning.model.packed_models import use_packed_attention
from finetuning.model.packing import Packing, packed_as
from finetuning.model.recompute import Known, made_by, maker_of, recomputing
from finetuning.model.response_head import ResponseHead, Targets

TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "down_proj", "o_proj"],
    "bloom": ["query_key_value", "dense", "dense_4h_to_h"],
}
# "as on a GPU": autocast computes layer norms in float32 there, and residuals stay in float32.
FORMATS = {"float32": (None, False), "bf16": (torch.bfloat16, False), "gpu": (torch.bfloat16, True)}
CASES = [(kind, method) for kind in tiny.CONFIGS for method in ("full", "lora")]


class LayerNormInFloat32(TorchFunctionMode):
    """As CUDA's autocast has it; the CPU's has not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.layer_norm:
            args = tuple(x.float() if torch.is_tensor(x) else x for x in args)
        return func(*args, **(kwargs or {}))


def model_of(kind: str, method: str = "full", **more: object):
    model = tiny.model_of(kind, **more)
    fuse_gelu(model)
    use_packed_attention(model)
    if method == "lora":
        torch.manual_seed(1)
        settings = LoraConfig(r=4, target_modules=TARGETS[kind], task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def step(model, form: str = "float32") -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes that are alive after the forward pass."""
    dtype, is_gpu = FORMATS[form]
    head, batch = ResponseHead(model), fake_cuda.batch_of([7, 1, 12, 5])
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, batch["input_ids"].shape, generator=random)
    tokens = torch.randint(5, 500, batch["targets"].shape, generator=random)
    targets = Targets(batch["positions"], tokens)
    tracker = StorageTracker()
    with (
        packed_as(Packing.of(batch)),
        LayerNormInFloat32() if is_gpu else nullcontext(),
    ):
        autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
        with tracker, head.scoring(targets), autocast:
            output = model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False)
        sizes = {number: tracker.sizes[number] for number in tracker.numbers.values()}
        output.logits.backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return output.logits.detach(), grads, sum(sizes.values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_what_is_computed_again_changes_no_bit(kind, method, form, monkeypatch):
    found, grads, alive = step(model_of(kind, method), form)
    monkeypatch.setattr(response_head, "recomputing", nullcontext)
    wanted, control, before = step(model_of(kind, method), form)
    assert torch.equal(found, wanted) and grads.keys() == control.keys()
    assert all(torch.equal(grads[name], control[name]) for name in control)
    assert alive < (0.95 if method == "full" else 1.0) * before


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_last_block_at_response_positions_gives_the_same_gradients(
    kind, method, form, monkeypatch
):
    found, grads, _ = step(model_of(kind, method), form)
    monkeypatch.setattr(LastBlock, "at", lambda self, positions: nullcontext())
    wanted, control, _ = step(model_of(kind, method), form)
    rounding = 1e-5 if form == "float32" else 3e-2
    assert found.item() == pytest.approx(wanted.item(), rel=rounding)
    assert grads.keys() == control.keys()
    for name in control:
        assert (grads[name] - control[name]).norm() <= rounding * control[name].norm() + 1e-6, name


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_the_last_block_computes_the_rows_that_are_asked_for(kind):
    """Seen by its output, which is zero elsewhere."""
    model, rows = model_of(kind), torch.tensor([3, 8, 9])
    last = LastBlock(model)
    hidden = torch.randn(1, 12, 32)
    inputs = (hidden, hidden) if kind == "bloom" else (hidden,)
    mlp = last.block.mlp
    whole = mlp(*inputs)
    with last.at(rows):
        narrow = mlp(*inputs)
    torch.testing.assert_close(narrow[0, rows], whole[0, rows])
    assert narrow.count_nonzero(-1).nonzero()[:, 1].tolist() == rows.tolist()
    assert torch.equal(mlp(*inputs), whole)


def test_a_mixture_of_experts_computes_its_last_block_whole():
    model = tiny.model_of("mixtral", num_local_experts=4)
    before = model.model.layers[-1].self_attn.o_proj.forward
    LastBlock(model)
    assert model.model.layers[-1].self_attn.o_proj.forward == before


def test_a_batch_without_targets_leaves_every_weight_a_gradient():
    """Or DDP would wait for it."""
    model = model_of("gpt2")
    head, ids = ResponseHead(model), torch.randint(5, 500, (1, 9))
    nothing = Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    with head.scoring(nothing), packed_as(Packing((9,), torch.arange(9)[None])):
        output = model(input_ids=ids, position_ids=torch.arange(9)[None], use_cache=False)
    output.logits.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_tensor_that_was_changed_in_place_is_kept():
    source = torch.randn(4, requires_grad=True)
    with recomputing():
        output = source * 2
        made_by(lambda x: x * 2, output, source)
        assert torch.equal(maker_of(output[1:])(), output[1:])
        output.mul_(3)
        assert maker_of(output) is None
    assert Known.makers is None


def test_hooks_that_offload_activations_are_left_in_force():
    kept = []
    offloading = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or x, lambda x: x
    )
    with offloading:
        step(model_of("gpt2"))
    assert len(kept) > 20


def test_an_input_that_was_changed_in_place_is_an_error():
    source = torch.randn(4)
    with recomputing():
        output = torch.randn(4, requires_grad=True) * source
        made_by(lambda x: x, output, source)
        make = maker_of(output)
    source.add_(1)
    with pytest.raises(AssertionError, match="changed in place"):
        make()
