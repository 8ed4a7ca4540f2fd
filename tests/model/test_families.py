"""The families of FAMILIES: packed, padded and example by example are one training."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from finetuning.data.collator import Collator
from finetuning.model.families import FAMILIES
from finetuning.model.isolation import require_isolation
from finetuning.model.lora_sum import sum_in_place
from finetuning.model.packed_models import use_packed_attention
from finetuning.model.packing import Packing, packed_as
from finetuning.model.response_head import ResponseHead, Targets, require_plain_head

WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# What a small config of the family needs, with everything in it that could go wrong.
CONFIGS = {
    "mistral": WINDOW,
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 2.0,
        **WINDOW,
    },
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        **WINDOW,
    },
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **WINDOW},
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 32, **EXPERTS},
    "olmoe": EXPERTS,
    "mixtral": {"num_local_experts": 4},
}
LENGTHS = (7, 3, 12, 9)  # some longer than the window


def examples() -> list[dict[str, np.ndarray]]:
    """Examples whose second half is trained."""
    draw, made = np.random.default_rng(0), []
    for length in LENGTHS:
        ids = draw.integers(5, 500, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, np.int32(-100), ids)
        made.append({"input_ids": ids, "labels": labels})
    return made


def model_of(kind: str, method: str):
    """(the model that is trained, the base model in it)"""
    base = tiny.model_of(kind, **CONFIGS.get(kind, {})).train()
    if method == "full":
        return base, base
    torch.manual_seed(0)
    settings = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=False
    )
    return get_peft_model(base, settings), base


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def example_by_example(kind: str, method: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of stock transformers, each example alone, with all logits."""
    model, _ = model_of(kind, method)
    total = torch.zeros(())
    for example in examples():
        ids, labels = (torch.tensor(example[name].tolist()) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
    total.backward()
    return total.item(), gradients(model)


def ours(kind: str, method: str, layout: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of one batch, as the trainer computes it."""
    model, base = model_of(kind, method)
    if method == "lora":
        sum_in_place(model)
    require_plain_head(base, None)
    batch = Collator(layout, 0)(examples())
    packing = None
    if layout == "packed":
        use_packed_attention(base)
        require_isolation(base, max(LENGTHS))
        packing = Packing.of(batch)
    head = ResponseHead(model)
    head.require_unmodified_logits(model)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    with packed_as(packing):
        with head.scoring(Targets(batch["positions"], batch["targets"])):
            loss = model(**inputs, use_cache=False).logits
        loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_and_padded_are_the_training_of_each_example_alone(kind, method):
    loss, expected = example_by_example(kind, method)
    for layout in ("packed", "padded"):
        found, grads = ours(kind, method, layout)
        assert found == pytest.approx(loss, rel=1e-5), layout
        assert grads.keys() == expected.keys(), layout
        for name, gradient in expected.items():
            difference = (grads[name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm() + 1e-6, f"{layout}: {name}"


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_a_model_that_changes_its_logits_answers_as_before_when_it_is_not_scored(kind):
    _, base = model_of(kind, "full")
    base.eval()
    ids = torch.arange(5, 13)[None]
    before = base(input_ids=ids).logits
    head = ResponseHead(base)
    head.require_unmodified_logits(base)
    assert torch.equal(base(input_ids=ids).logits, before)
    assert head.settings  # it was in the way
