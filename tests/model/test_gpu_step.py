"""What a training step does on a GPU, seen on fake CUDA tensors: products, kernels, waits,
memory."""

import fake_cuda
import pytest
import tiny
import torch
from conftest import ROOT
from fake_cuda import needs_fake_cuda
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from finetuning.budget.step_memory import as_trained, measure_step, meta_model
from finetuning.model.attention import attend
from finetuning.model.packing import Packing
from finetuning.model.quantization import cast_inputs_to_autocast
from finetuning.recipe.recipe import load_recipe

pytestmark = needs_fake_cuda

T4, A100 = ((7, 5), torch.float16), ((8, 0), torch.bfloat16)
LENGTHS = [70, 33, 100, 15]
LORA = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "bloom": ["query_key_value"],
}


def traced(
    kind: str, gpu, layout: str = "packed", bits: int = 0, dtype=torch.float32, batch=None, **more
):
    """A step's trace. With `bits` the base is in bitsandbytes' own layers, under an adapter."""
    batch = batch or fake_cuda.batch_of(LENGTHS, layout)
    capability, autocast = gpu
    recipe, config = settings_of(kind, layout, bits > 0 or dtype != torch.float32, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if bits:
            put_bitsandbytes_layers(model, bits, autocast)
            cast_inputs_to_autocast(model)
        model = as_trained(recipe, model)
    with fake_cuda.fake_gpu(capability) as trace, trace:
        fake_cuda.to_fake_gpu(model)
        if bits:
            fill_bitsandbytes_layers(model, bits)
        fake_cuda.training_step(trace, model, batch, autocast)
    return trace


def settings_of(kind: str, layout: str, has_lora: bool, **more):
    """(recipe, config)"""
    lora = [f"lora={{r: 4, target_modules: {LORA[kind]}}}"] if has_lora else []
    recipe = load_recipe(ROOT / "recipes/dolly_gpt2.yaml", [f"data.layout={layout}", *lora])
    end = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=500, **end, **{**tiny.CONFIGS[kind], **more})
    return recipe, config


def put_bitsandbytes_layers(model, bits: int, compute: torch.dtype) -> None:
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (torch.nn.Linear, Conv1D)) and child is not head:
                shape = child.weight.T.shape if isinstance(child, Conv1D) else child.weight.shape
                size, bias = tuple(reversed(shape)), child.bias is not None
                if bits == 8:
                    layer = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, threshold=6.0)
                else:
                    layer = bnb.nn.Linear4bit(*size, bias, compute_dtype=compute, quant_type="nf4")
                if bias:
                    layer.bias = torch.nn.Parameter(torch.empty_like(child.bias), False)
                setattr(module, name, layer)


def fill_bitsandbytes_layers(model, bits: int) -> None:
    """What their quantization leaves on a GPU."""
    import bitsandbytes as bnb

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            weight = torch.empty(
                layer.out_features, layer.in_features, dtype=torch.int8, device="cuda:0"
            )
            layer._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
            layer.weight.CB = layer.weight.SCB = None
            layer.state.CB = weight
            layer.state.SCB = torch.empty(layer.out_features, device="cuda:0")
        elif isinstance(layer, bnb.nn.Linear4bit):
            count = layer.out_features * layer.in_features
            weight = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="cuda:0")
            layer._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
            layer.weight.quant_state = layer.quant_state = quant_state_of(layer, count)


def quant_state_of(layer, count: int):
    """Of a layer in 4 bits with double quantization."""
    from bitsandbytes.functional import QuantState

    def new(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cuda:0")

    blocks = -(-count // 64)
    second = QuantState(new(-(-blocks // 256)), code=new(256), blocksize=256, dtype=torch.float32)
    return QuantState(
        new(blocks, torch.uint8),
        shape=torch.Size((layer.out_features, layer.in_features)),
        dtype=layer.compute_dtype,
        blocksize=64,
        code=new(16),
        quant_type="nf4",
        offset=torch.empty((), device="cuda:0"),
        state2=second,
    )


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("gpu", [T4, A100], ids=["T4", "A100"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_step_waits_for_nothing(kind, gpu, layout):
    assert traced(kind, gpu, layout).waits == []


def test_a_wait_is_seen():
    with fake_cuda.fake_gpu((8, 0)) as trace, trace:
        tensor = torch.ones(3, device="cuda:0")
        assert not (tensor == 0).all()
        torch.ones(3).to("cuda:0")
    assert trace.waits == ["value of the device", "blocking copy to the device"]


EMBEDDINGS = {"gpt2": 2, "llama": 1, "bloom": 1}  # GPT-2's positions have one


def sorts(trace) -> int:
    """Operations that sort positions on a GPU."""
    names = ("index_put", "embedding_dense_backward")
    return sum(n for name, n in trace.operations.items() if name.startswith(names))


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("gpu", [T4, A100], ids=["T4", "A100"])
def test_no_attention_runs_in_the_math_kernel_or_sorts_in_backward(kind, gpu):
    trace = traced(kind, gpu)
    assert trace.kernels["math"] == 0
    assert sorts(trace) == EMBEDDINGS[kind]


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("gpu", [T4, A100], ids=["T4", "A100"])
def test_a_step_on_pairs_is_computed_as_one_on_other_examples(kind, gpu):
    trace = traced(kind, gpu, batch=fake_cuda.batch_of_pairs([70, 33], 15))
    assert trace.waits == [] and trace.kernels == traced(kind, gpu).kernels
    assert sorts(trace) == EMBEDDINGS[kind]


def test_a_t4_attends_to_grouped_keys_of_padded_rows_in_a_kernel_too():
    assert traced("llama", T4, "padded").kernels == {"memory-efficient": 2}


@pytest.mark.parametrize("gpu", [T4, A100], ids=["T4", "A100"])
def test_the_mask_of_bloom_is_one_for_all_layers(gpu):
    """A kernel would copy one whose rows are not aligned."""
    assert traced("bloom", gpu).kernels == {"memory-efficient": 2}


def test_dropout_does_not_keep_an_a100_from_flash_attention():
    flash = "_flash_attention_forward.default"
    trace = traced("gpt2", A100, attn_pdrop=0.1)
    assert trace.operations[flash] == 2 and not trace.kernels
    assert traced("gpt2", T4, attn_pdrop=0.1).operations[flash] == 0


@pytest.mark.parametrize(
    ("size", "value", "is_taken"),
    [(64, 64, True), (256, 256, True), (100, 100, False), (512, 512, False), (192, 128, False)],
)
def test_flash_attention_is_given_heads_that_it_takes(size, value, is_taken):
    lengths = (5, 15)
    with fake_cuda.fake_gpu((8, 0)) as trace, trace:
        positions = torch.empty(1, 20, device="cuda:0", dtype=torch.long)
        q, k = (
            torch.empty(1, 4, 20, size, device="cuda:0", dtype=torch.bfloat16) for _ in range(2)
        )
        v = torch.empty(1, 4, 20, value, device="cuda:0", dtype=torch.bfloat16)
        assert attend(q, k, v, Packing(lengths, positions), None).shape == (1, 4, 20, value)
    assert trace.operations["_flash_attention_forward.default"] == is_taken


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("gpu", [T4, A100], ids=["T4", "A100"])
def test_every_product_of_an_8_bit_step_s_backward_is_half(kind, gpu):
    trace = (
        traced(kind, gpu, bits=8, hidden_size=64) if kind != "gpt2" else traced(kind, gpu, bits=8)
    )
    backward = {dtype for phase, dtype in trace.flops if phase == "backward"}
    assert backward == {gpu[1]}
    assert trace.flops["forward", torch.int8] > 0


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_half_base_under_an_adapter_is_not_cast_in_every_step(kind):
    half, whole = (
        traced(kind, A100, dtype=dtype, n_layer=4, num_hidden_layers=4)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half.marks["weights"] < 0.6 * whole.marks["weights"]
    assert half.peak < 0.85 * whole.peak


@pytest.mark.parametrize("gpu", [T4, A100], ids=["T4", "A100"])
@pytest.mark.parametrize(
    ("kind", "bits", "more"),
    [
        ("gpt2", 0, {"n_embd": 256, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
        ("llama", 0, {"hidden_size": 256, "num_attention_heads": 8}),
        ("bloom", 0, {"hidden_size": 256}),
        ("bloom", 8, {"hidden_size": 256}),
        ("bloom", 4, {"hidden_size": 256}),
        ("llama", 8, {"hidden_size": 256, "num_attention_heads": 8}),
    ],
)
def test_the_budget_is_what_the_step_allocates(kind, bits, more, gpu):
    (capability, autocast), dtype = gpu, gpu[1] if bits else torch.float32
    trace = traced(kind, gpu, bits=bits, dtype=dtype, **more)
    recipe, config = settings_of(kind, "packed", bits > 0, **more)
    model = recipe.model.model_copy(
        update={
            "quantization": f"{bits}bit" if bits else None,
            "dtype": str(dtype).removeprefix("torch."),
        }
    )
    recipe = recipe.model_copy(update={"model": model})
    batch = fake_cuda.batch_of(LENGTHS)
    memory = measure_step(recipe, meta_model(recipe, config), batch, autocast, capability)
    parts = memory.peak()
    assert sum(parts.values()) - parts["optimizer"] == pytest.approx(trace.peak, rel=0.15)
