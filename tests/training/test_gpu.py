"""The five minutes that prove a GPU: kernels, losses, waits, number formats, resuming.

`make test-gpu` runs these and every other test that is marked `gpu`, and reports their figures.
What a CPU can run of them it runs in `make test`, so that a mistake of the check shows there.
"""

import fake_cuda
import pytest
import tiny
import torch
from run_folders import interrupted, run_folder
from run_folders import losses_of as logged_losses
from safetensors.torch import load_file
from trainings import LORA_TARGETS, losses_of, prepared_run, recipe_of, write_rows
from transformers import TrainerCallback

from finetuning.launch.devices import require_kernels
from finetuning.training import sft_config
from finetuning.training.train import make_trainer
from finetuning.training.trainer import ResponseTrainer

STEPS = 10
DROPOUT = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.1)
MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2 with dropout": ("gpt2", DROPOUT),
    "llama, grouped keys": ("llama", {}),
    "bloom": ("bloom", {}),
    "llama, heads of 100": ("llama", {"width": 200, "num_attention_heads": 2}),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def trainer_of(tmp_path):
    """A function: a trainer of STEPS steps of a model of MODELS, in the run folder of that name."""

    def make(name: str, run: str, *overrides: str) -> ResponseTrainer:
        kind, config = MODELS[name]
        base = tmp_path / "base"
        tokenizer = tiny.byte_level()
        size = {"vocab_size": len(tokenizer), "width": 64}
        tiny.model_of(kind, **{**size, **config}).save_pretrained(base)
        tokenizer.save_pretrained(base)
        # A higher rate would blow differences of rounding up.
        steps = [f"training.max_steps={STEPS}", "training.learning_rate=3e-4", "data.eval=null"]
        rows = write_rows(tmp_path)
        recipe = recipe_of((kind, base), rows, tmp_path / run, *steps, *overrides)
        (tmp_path / run).mkdir()
        return make_trainer(prepared_run(recipe))

    return make


def losses_in(trainer: ResponseTrainer) -> list[float]:
    """Of every step that is trained now."""
    trainer.train()
    return losses_of(trainer)


def on(device: str) -> str:
    return f"training.use_cpu={str(device == 'cpu').lower()}"


def furthest(losses: list[float], others: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(one / other - 1) for one, other in zip(losses, others, strict=True))


@pytest.mark.gpu
def test_torch_has_kernels_for_this_gpu():
    require_kernels()
    assert torch.ones(2, device="cuda").sum().item() == 2


@pytest.mark.gpu
def test_bitsandbytes_has_a_library_for_this_cuda():
    from bitsandbytes.cextension import lib

    assert lib.compiled_with_cuda


@pytest.mark.gpu
def test_the_quickstart_learns_what_it_learns_on_a_cpu(run_script, tmp_path, record_property):
    """Its loss falls from 7.02 to 0.17 on a CPU, in bfloat16 there to 0.15."""
    found = {}
    for device in ("cpu", "cuda"):
        output = f"training.output_dir={tmp_path / device}"
        done = run_script("sft.py", "recipes/quickstart.yaml", output, on(device), timeout=540)
        assert done.returncode == 0, done.stderr[-3000:]
        (_, first), *_, (_, last) = found[device] = logged_losses(tmp_path / device, "eval_loss")
        record_property(f"evaluation loss on {device}", f"{first:.3f} to {last:.3f}")
    (_, first), *_, (_, last) = found["cpu"]
    assert found["cuda"][-1][1] == pytest.approx(last, abs=0.02 * (first - last))


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("llama, heads of 100", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in MODELS),
    ],
)
def test_packed_and_padded_rows_have_the_losses_of_a_cpu(name, device, trainer_of, record_property):
    expected = losses_in(trainer_of(name, "cpu", on("cpu"), "data.layout=padded"))
    limit = 1e-5 if device == "cpu" else 5e-2 if "dropout" in name else 1e-2
    for layout in ("packed", "padded"):
        found = losses_in(trainer_of(name, layout, on(device), f"data.layout={layout}"))
        record_property(layout, f"within {furthest(found, expected):.1e}")
        assert found == pytest.approx(expected, rel=limit)


class RefuseWaits(TrainerCallback):
    """From the second step on, a wait for the GPU is an error.

    In fp16 until the gradients are there only: the gradient scaler asks whether they are finite.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            torch.cuda.set_sync_debug_mode("error")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.fp16:
            torch.cuda.set_sync_debug_mode("default")

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_no_step_that_does_not_log_waits_for_the_gpu(layout, device, trainer_of, monkeypatch):
    modes = []
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    silent = f"training.logging_steps={STEPS + 1}"
    trainer = trainer_of("gpt2", "run", on(device), silent, f"data.layout={layout}")
    trainer.add_callback(RefuseWaits())
    trainer.train()
    assert device != "cpu" or modes == ["default", *(["error", "default"] * (STEPS - 1))]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bloom", "llama, grouped keys"])
def test_every_product_of_an_8_bit_step_s_backward_is_half_on_a_gpu_too(
    name, trainer_of, record_property, monkeypatch
):
    lora = f"lora={{r: 4, target_modules: {LORA_TARGETS[MODELS[name][0]]}}}"
    trainer = trainer_of(name, "run", on("cuda"), "model.quantization=8bit", lora)
    trace, backward = fake_cuda.Trace(), trainer.accelerator.backward

    def traced_backward(*args, **kwargs):
        trace.phase = "backward"
        with torch.autograd.set_multithreading_enabled(False), trace:
            backward(*args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "backward", traced_backward)
    trainer.train()
    record_property("multiplied in", ", ".join(str(dtype) for _, dtype in trace.flops))
    assert {dtype.itemsize for _, dtype in trace.flops} == {2}


@pytest.mark.parametrize("name", ["gpt2", "llama, grouped keys", "bloom"])
def test_an_adapter_on_a_half_precision_base_has_the_losses_of_one_in_float32(
    name, trainer_of, monkeypatch
):
    """What `model.dtype: auto` has on a GPU beside what it has on a CPU: within 1.2e-3 in bfloat16
    and 1e-4 in float16, with the CPU's own autocast and gradient scaler."""
    lora = f"lora={{r: 4, target_modules: {LORA_TARGETS[MODELS[name][0]]}}}"
    settings = [on("cpu"), lora, "training.learning_rate=1e-2"]
    expected = losses_in(trainer_of(name, "whole", *settings))
    assert expected[-1] < expected[0] - 0.5
    for dtype in ("bfloat16", "float16"):
        formats = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
        monkeypatch.setattr(sft_config, "precision", lambda *_, formats=formats: formats)
        trainer = trainer_of(name, dtype, *settings, f"model.dtype={dtype}")
        if formats["fp16"]:
            compute_in_fp16(trainer.accelerator)
        weights = list(trainer.model.parameters())
        assert {str(w.dtype) for w in weights if not w.requires_grad} == {f"torch.{dtype}"}
        assert {w.dtype for w in weights if w.requires_grad} == {torch.float32}
        found = losses_in(trainer)
        assert found != expected and found == pytest.approx(expected, rel=1e-2), dtype


def compute_in_fp16(accelerator) -> None:
    """As accelerate does on a GPU only."""
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu")


@pytest.mark.gpu
def test_a_stopped_run_ends_near_the_weights_of_one_that_was_not(
    tmp_path, monkeypatch, record_property
):
    """Not bit for bit: some kernels add up in an order that varies."""
    steps = [f"training.max_steps={STEPS}", "training.save_strategy=steps", "training.save_steps=5"]
    again, whole = (run_folder(tmp_path / name, *steps) for name in ("stopped", "whole"))
    interrupted(again, f"checkpoint-{STEPS}", "model.safetensors", "sealed.json")
    run_folder(tmp_path / "stopped", *steps)
    ours, theirs = (load_file(run / "model.safetensors") for run in (again, whole))
    apart = max((ours[name] - weight).norm() / weight.norm() for name, weight in theirs.items())
    record_property("furthest weight", f"{apart:.1e} of its norm")
    assert apart < 1e-2
