"""An adapter that is added in place gives what peft gives, from fewer tensors."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from finetuning.budget.step_memory import as_trained
from finetuning.model.lora import add_adapter, lora_config
from finetuning.model.lora_sum import SumInPlace, sum_in_place
from finetuning.recipe.recipe import load_recipe

TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "down_proj"],
    "bloom": ["query_key_value"],
}
SETTINGS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.5},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


class Wide(TorchDispatchMode):
    """Counts storages made with so many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.made = columns, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.shape[-1] == self.columns:
            storage = output.untyped_storage()
            self.made[storage.data_ptr()] = storage  # kept, so that no other gets its place
        return output


def pair(kind: str, dtype: torch.dtype = torch.float32, **settings: object):
    """The same adapted model twice: as peft makes it, and with sums in place."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=TARGETS[kind],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **settings,
    )
    theirs = get_peft_model(tiny.model_of(kind).to(dtype), config).train()
    ours = copy.deepcopy(theirs)
    sum_in_place(ours)
    return theirs, ours


def step(model, autocast: torch.dtype | None = None):
    """Logits, and the gradients of all that is trained."""
    ids = torch.randint(5, 500, (2, 9), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)  # of dropout
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        logits = model(input_ids=ids, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def fused(model) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_variant", {}).get("default"), SumInPlace)
    ]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", TARGETS)
def test_logits_and_gradients_are_peft_s(kind, settings):
    theirs, ours = pair(kind, **SETTINGS[settings])
    assert bool(fused(ours)) == (settings not in ("bias", "dora"))
    (expected, of_theirs), (found, of_ours) = step(theirs), step(ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert of_ours.keys() == of_theirs.keys()
    for name, gradient in of_theirs.items():
        torch.testing.assert_close(of_ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("base", "autocast"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None),
    ],
)
def test_in_half_precision_it_is_as_close_to_float32_as_peft_s(base, autocast):
    exact, _ = step(pair("llama")[0])
    theirs, ours = (step(model, autocast)[0].float() for model in pair("llama", base))
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_one_tensor_as_wide_as_the_output_is_made_beside_the_base_layer_s():
    made = []
    for model in pair("gpt2"):
        layer = model.base_model.model.transformer.h[0].attn.c_attn
        with Wide(layer.out_features) as wide:
            layer(torch.randn(1, 9, layer.in_features))
        made.append(len(wide.made))
    weight = 1  # lora_B's, transposed
    assert made == [4 + weight, 2 + weight]


def test_an_adapter_that_is_switched_off_is_off():
    _, ours = pair("gpt2")
    ours.eval()
    ids = torch.arange(5, 13)[None]
    with ours.disable_adapter():
        off = ours(input_ids=ids).logits
    assert torch.equal(off, tiny.model_of("gpt2").eval()(input_ids=ids).logits)
    assert not torch.allclose(ours(input_ids=ids).logits, off)


def test_training_and_its_estimate_have_it():
    lora = f"lora={{r: 4, target_modules: {TARGETS['gpt2']}}}"
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [lora])
    args = SimpleNamespace(seed=0, deepspeed_plugin=None, activation_checkpointing=False)
    trained = add_adapter(tiny.model_of("gpt2"), lora_config(recipe), args)
    estimated = as_trained(recipe, tiny.model_of("gpt2"))
    assert (
        len(fused(trained)) == len(fused(estimated)) == 2 * len(tiny.model_of("gpt2").transformer.h)
    )
