"""LoRA on 8-bit and 4-bit base models: what is trained, in which number format, what is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from peft import PeftModel
from run_folders import interrupted, run_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import generate
from finetuning.data.cache import prepare
from finetuning.errors import UserError
from finetuning.export.merging import merge
from finetuning.inference.trained_model import load_trained
from finetuning.launch.strategy import requested_strategy
from finetuning.model.precision import precision
from finetuning.model.quantization import hide_bitsandbytes
from finetuning.model.tokenizer import read_tokenizer
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.folder import RunFolder
from finetuning.runs.samples import read_samples
from finetuning.training.prepared_run import PreparedRun
from finetuning.training.train import make_trainer

CASES = [(kind, bits) for kind in ("bloom", "llama") for bits in ("8bit", "4bit")]
TARGETS = {
    "bloom": "[query_key_value, dense_h_to_4h, dense_4h_to_h]",
    "llama": "[q_proj, v_proj, up_proj, down_proj]",
}
LAYERS = 2
FACTS = {
    "What is 2 + 3?": "five",
    "What is red?": "a colour",
    "Who is there?": "only me",
    "日本の首都は？": "東京",
}


def base_folder(kind: str, folder: Path) -> Path:
    tokenizer = tiny.byte_level()
    # bitsandbytes rounds in blocks of 64 on the CPU.
    tiny.model_of(kind, vocab_size=len(tokenizer), width=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def overrides_for(kind: str, bits: str, base: Path) -> list[str]:
    rows = [{"prompt": question, "response": answer} for question, answer in FACTS.items()] * 5
    (base / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [
        f"data.path={base / 'rows.jsonl'}",
        "data.eval.group_by=null",  # it is evaluated on copies of what it is trained on
        "model.from_scratch=null",
        f"model.name={base}",
        f"model.quantization={bits}",
        f"lora={{r: 8, lora_alpha: 16, target_modules: {TARGETS[kind]}}}",
        "training.learning_rate=3e-2",
        "training.logging_steps=1",
        "generation.max_new_tokens=16",
        f"generation.prompts={json.dumps(list(FACTS), ensure_ascii=False)}",
    ]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def run(request, tmp_path_factory):
    """(architecture, bits, folder of the base, its weights before training, run folder)"""
    kind, bits = request.param
    folder = tmp_path_factory.mktemp(f"{kind}_{bits}")
    base = base_folder(kind, folder / "base")
    before = load_file(base / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        result = run_folder(folder, *overrides_for(kind, bits, base), "training.max_steps=120")
    return kind, bits, base, before, result


def test_the_loss_falls(run):
    *_, folder = run
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    assert losses[-1] < 0.8 * losses[0] and evaluated[-1] < 0.8 * evaluated[0]


def test_only_the_adapter_moved_and_it_is_float32(run):
    kind, _, base, before, folder = run
    after = load_file(base / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter = load_file(folder / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    moved = [
        name for name, weight in adapter.items() if "lora_B" in name and weight.abs().max() > 0
    ]  # it starts at 0
    assert len(moved) == len(adapter) // 2 == LAYERS * TARGETS[kind].count(",") + LAYERS
    assert not (folder / "model.safetensors").exists()


def test_the_folder_answers_as_training_did(run, capsys):
    *_, folder = run
    generate.main([str(folder), *FACTS])
    answers = capsys.readouterr().out.splitlines()
    assert answers == [sample.after for sample in read_samples(folder)]


def test_a_plain_base_takes_the_adapter_too(run):
    """Its weights are those before rounding: the loss is as low, not the same."""
    *_, folder = run
    recipe = load_recipe(folder / "recipe.yaml")
    tokenizer = read_tokenizer(str(folder))
    ids = torch.tensor([tokenizer("What is red?", add_special_tokens=False).input_ids])
    plain = load_recipe(folder / "recipe.yaml", ["model.quantization=null"])
    with torch.no_grad():
        quantised, whole = (
            load_trained(folder, each, tokenizer)(ids).logits.log_softmax(-1)
            for each in (recipe, plain)
        )
        base = AutoModelForCausalLM.from_pretrained(recipe.model.name)(ids).logits.log_softmax(-1)
    assert (whole - quantised).norm() < 0.5 * (whole - base).norm()


def test_merged_weights_are_base_and_adapter(run, tmp_path):
    _, _, base, before, folder = run
    merge(RunFolder(folder), load_recipe(folder / "recipe.yaml"), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(folder / "adapter_model.safetensors")
    changed = 0
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            scale = 16 / 8  # lora_alpha / r
            weight = (
                weight
                + scale * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
            )
            changed += 1
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-5)
    assert changed == len(adapter) // 2
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        apart = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
            .eval()(ids)
            .logits
        )
        together = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5 * apart.abs().max().item())


def stopped_and_whole(folder: Path, *overrides: str) -> tuple[Path, Path]:
    """A run of ten steps, and one that was stopped after five and resumed."""
    steps = [
        "training.max_steps=10",
        "training.save_strategy=steps",
        "training.save_steps=5",
        "generation.prompts=[]",
    ]
    whole = run_folder(folder / "whole", *overrides, *steps)
    again = run_folder(folder / "stopped", *overrides, *steps)
    interrupted(again, "checkpoint-10", "adapter_model.safetensors")
    return whole, run_folder(folder / "stopped", *overrides, *steps)


def test_a_stopped_run_ends_with_the_same_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = overrides_for("bloom", "8bit", base_folder("bloom", tmp_path / "base"))
    overrides += ["training.save_total_limit=null", "lora.lora_dropout=0.1"]
    whole, again = (
        load_file(run / "adapter_model.safetensors")
        for run in stopped_and_whole(tmp_path, *overrides)
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_gpu_trains_a_float32_adapter_in_fp16(tmp_path, monkeypatch, bits):
    monkeypatch.chdir(ROOT)
    overrides = overrides_for("bloom", bits, base_folder("bloom", tmp_path / "base"))
    folder = run_folder(tmp_path, *overrides, "training.max_steps=120", "training.fp16=true")
    launch = json.loads((folder / "environment.json").read_text())["launches"][-1]
    assert launch["precision"] == "fp16" and launch["device"].startswith("cuda")
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("overrides", "is_hidden"),
    [
        (["training.optim=adamw_torch"], True),
        (["training.optim=adamw_8bit"], False),
        (["model.quantization=8bit", "lora={r: 4}"], False),
    ],
)
def test_bitsandbytes_is_hidden_from_a_run_that_has_no_use_for_it(
    tmp_path, monkeypatch, overrides, is_hidden
):
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    hide_bitsandbytes(recipe_with(tmp_path, *overrides))
    assert ("bitsandbytes" in sys.modules) == is_hidden
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)


def test_a_run_without_use_for_bitsandbytes_does_not_import_it(tmp_path):
    code = (
        "import sys, sft; sft.main(sys.argv[1:]); "
        "print('bitsandbytes is', 'there' if sys.modules.get('bitsandbytes') else 'not there')"
    )
    overrides = ["training.max_steps=2", "generation.prompts=[]", f"training.output_dir={tmp_path}"]
    command = [
        "-c",
        code,
        "recipes/quickstart.yaml",
        *overrides,
        "training.report_to=none",
    ]
    environment = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "bitsandbytes is not there" in done.stdout, done.stderr


# Number formats


def autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def train_in_fp16(trainer, steps: int) -> set[torch.dtype]:
    """Trains with fp16 autocast and a gradient scaler, as accelerate does on a GPU only.

    Returns the formats of autocast that the head saw.
    """
    trainer.args.max_steps, trainer.args.eval_on_start = steps, False
    accelerator = trainer.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    seen, compute_loss = set(), trainer.compute_loss

    def watched(*args, **kwargs):
        hook = trainer.head.head.register_forward_pre_hook(lambda *_: seen.add(autocast_dtype()))
        try:
            return compute_loss(*args, **kwargs)
        finally:
            hook.remove()

    trainer.compute_loss = watched
    trainer.train()
    return seen


@pytest.mark.parametrize("bits", ["8bit", "4bit", "null"])
def test_fp16_autocast_trains_a_float32_adapter_with_a_gradient_scaler(tmp_path, monkeypatch, bits):
    """What a T4 does, with the CPU's own fp16 autocast and scaler in place of CUDA's."""
    monkeypatch.chdir(ROOT)
    overrides = overrides_for("bloom", bits, base_folder("bloom", tmp_path / "base"))
    recipe = load_recipe("recipes/quickstart.yaml", [*overrides, f"training.output_dir={tmp_path}"])
    assert precision(recipe, torch.device("cuda"), (7, 5)) == {"bf16": False, "fp16": True}
    tokenizer = read_tokenizer(recipe.model.name)
    examples = prepare(recipe.data, tokenizer)
    trainer = make_trainer(PreparedRun(recipe, requested_strategy(), tokenizer, examples))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    assert train_in_fp16(trainer, steps=3) == {torch.float16}
    assert (
        trainer.accelerator.scaler.is_enabled()
        and trainer.optimizer.scaler is trainer.accelerator.scaler
    )
    trained = {
        name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    moments = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if value.dim()
    ]
    assert len(moments) == 2 * len(trained) and {value.dtype for value in moments} == {
        torch.float32
    }
    moved = {
        name
        for name, weight in trainer.model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert moved == trained.keys()


def recipe_with(tmp_path: Path, *overrides: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name: gpt2}\n"
        "data: {path: rows.jsonl, reader: prompt_response, template: question_answer}\n"
        "training: {output_dir: run}\n"
    )
    return load_recipe(file, overrides)


T4, A100, CPU = (
    (torch.device("cuda"), (7, 5)),
    (torch.device("cuda"), (8, 0)),
    (torch.device("cpu"), None),
)


@pytest.mark.parametrize(
    ("machine", "overrides", "expected"),
    [
        (T4, [], "fp16"),
        (A100, [], "bf16"),
        (CPU, [], None),
        (T4, ["training.fp16=true"], "fp16"),
        (A100, ["training.fp16=true"], "fp16"),
        (T4, ["training.bf16=false"], None),
        (A100, ["training.bf16=false"], None),
        (CPU, ["training.bf16=true"], "bf16"),
        (T4, ["model.dtype=float16", "lora={r: 4}"], "fp16"),
        (A100, ["model.dtype=bfloat16"], "bf16"),
    ],
)
def test_the_number_format_is_what_the_recipe_says_or_the_machine_computes(
    tmp_path, machine, overrides, expected
):
    found = precision(recipe_with(tmp_path, *overrides), *machine)
    assert found == {"bf16": expected == "bf16", "fp16": expected == "fp16"}


@pytest.mark.parametrize(
    ("machine", "overrides", "complaint"),
    [
        (T4, ["training.bf16=true"], r"this GPU \(compute capability 7\.5\) only emulates it"),
        (T4, ["model.dtype=bfloat16"], r"model\.dtype: bfloat16, which this GPU .* only emulates"),
        (
            A100,
            ["model.dtype=float16", "lora={r: 4}"],
            r"model\.dtype: float16 needs the loss scaling",
        ),
        (
            CPU,
            ["model.dtype=float16", "lora={r: 4}"],
            r"the loss scaling of fp16, which is off on the CPU",
        ),
        (CPU, ["training.fp16=true"], "the CPU has no fp16 training"),
    ],
)
def test_a_number_format_that_cannot_work_is_refused(tmp_path, machine, overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        precision(recipe_with(tmp_path, *overrides), *machine)


def test_the_base_is_really_quantised(run):
    _, bits, _, _, folder = run
    model = load_trained(folder, load_recipe(folder / "recipe.yaml"), read_tokenizer(str(folder)))
    layers = {type(module).__name__ for module in model.modules()}
    assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits] in layers
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.get_input_embeddings().weight.dtype == torch.float32
