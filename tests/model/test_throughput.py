"""The FLOPs that are named are those of the products that are computed."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetuning.budget.gpu_stand_ins import quantize_linear_layers
from finetuning.model.flops import matmul_params_of
from finetuning.model.loading import load_model
from finetuning.model.response_head import ResponseHead, Targets
from finetuning.model.throughput import Throughput
from finetuning.recipe.sections import Model

TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "down_proj"],
    "bloom": ["query_key_value"],
}
TOKENS, RESPONSES = 2 * 9, 4


def adapted(model, kind: str):
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS[kind])
    )
    # Else the backward ends before a frozen first layer.
    model.enable_input_require_grads()
    return model


def multiplied(model) -> int:
    """FLOPs of a training step's matrix products, without attention's, which are batched."""
    ids = torch.randint(5, 500, (2, 9), generator=torch.Generator().manual_seed(1))
    targets = Targets(torch.tensor([3, 4, 9, 16]), ids.flatten()[[4, 5, 10, 17]])
    aten = torch.ops.aten
    added = {
        aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]
    }  # torch does not know it
    counter = FlopCounterMode(display=False, custom_mapping=added)
    with counter, ResponseHead(model).scoring(targets):
        model(input_ids=ids, use_cache=False).logits.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(product, 0) for product in (aten.mm, aten.addmm, aten.addmm_))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_they_are_those_of_a_step(kind, method):
    """Embeddings are tied in GPT-2 and BLOOM, and not in Llama."""
    model = tiny.model_of(kind).train()
    if method == "lora":
        model = adapted(model, kind)
    params = matmul_params_of(model)
    assert params.flops(TOKENS, RESPONSES) == multiplied(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Not quite a whole forward more: torch ends it at the last tensor that backward needs.
    assert (
        params.flops(TOKENS, RESPONSES)
        < multiplied(model)
        <= params.flops(TOKENS, RESPONSES, is_checkpointed=True)
    )


def test_of_a_mixture_the_experts_that_a_token_takes_are_counted():
    settings = {**tiny.CONFIGS["llama"], "vocab_size": 300, "num_hidden_layers": 1}
    plain, mixed = (
        matmul_params_of(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings, **more))
        )
        for kind, more in (
            ("mistral", {}),
            ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        )
    )
    expert = 3 * settings["hidden_size"] * settings["intermediate_size"]
    router = mixed.layers - (plain.layers + plain.last + expert)
    assert 0 <= router <= 4 * settings["hidden_size"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_base_in_few_bits_multiplies_as_much_as_a_plain_one(kind, bits, tmp_path):
    tokenizer = tiny.byte_level()
    plain = tiny.model_of(kind, vocab_size=len(tokenizer), width=64)
    plain.save_pretrained(tmp_path)
    expected = matmul_params_of(adapted(plain, kind))
    real = load_model(Model(name=str(tmp_path), quantization=f"{bits}bit"), tokenizer, seed=0)
    assert real.is_quantized and matmul_params_of(adapted(real, kind)) == expected
    held = tiny.model_of(kind, vocab_size=len(tokenizer), width=64)
    quantize_linear_layers(held, bits)
    for weight in held.parameters():
        weight.requires_grad_(False)
    assert matmul_params_of(held).head == expected.head
    assert matmul_params_of(held).layers == expected.layers - expected.trained
    assert matmul_params_of(held).last == expected.last - expected.trained_last


def test_what_zero_3_leaves_of_a_weight_does_not_matter():
    model = tiny.model_of("gpt2")
    whole = Throughput(model, torch.device("cpu"))
    for weight in model.parameters():
        weight.data = torch.empty(0)
    shared_out = Throughput(model, torch.device("cpu"))
    batch = {"lengths": [9, 9], "targets": torch.zeros(RESPONSES)}
    assert (
        shared_out.flops_of(batch)
        == whole.flops_of(batch)
        == whole.matmul_params.flops(TOKENS, RESPONSES)
        > 0
    )
