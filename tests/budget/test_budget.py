"""The budget is what a run takes: against reality, and in how it follows recipe and strategy."""

import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import ROOT
from pages import listed_recipes
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import preview
from finetuning.budget import budget as budget_module
from finetuning.budget import step_memory, storage_tracker
from finetuning.budget.budget import make_budget
from finetuning.budget.savings import enough
from finetuning.budget.step_memory import TrackedHead, as_trained, meta_model, run_step
from finetuning.budget.storage_tracker import StorageTracker
from finetuning.data.collator import Collator
from finetuning.data.examples import Examples
from finetuning.data.storage import Prepared
from finetuning.errors import UserError
from finetuning.launch import devices
from finetuning.launch.strategy import Strategy
from finetuning.recipe.recipe import load_recipe
from finetuning.runs.budget_table import budget_table, print_budget

sys.path.append(str(ROOT / "benchmarks"))  # behind src, which has a dpo.py too
import memory

SINGLE = Strategy("single", 1)
# config.json of bigscience/bloomz-1b1, as far as it decides shapes.
BLOOMZ_1B1 = {
    "model_type": "bloom",
    "hidden_size": 1536,
    "n_layer": 24,
    "n_head": 16,
    "vocab_size": 250880,
}


def write_config(folder: Path, fields: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def prepared(examples: int, length: int) -> Prepared:
    """Examples of one length, the second half of each response."""
    ids = np.full((examples, length), 5, np.int32)
    labels = np.where(np.arange(length) < length // 2, -100, ids)
    whole = Examples(ids.ravel(), labels.ravel(), np.full(examples, length), np.arange(examples))
    return Prepared(whole, None, {}, "")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("gpt2"), {**memory.MODELS["gpt2"], "n_layer": 2, "vocab_size": 3000}
    )


FREE = ("data.eval=null", "training.eval_strategy=no", "training.global_batch_size=null")


def budget_of(
    model: Path, *overrides: str, strategy: Strategy = SINGLE, gpu: str = "t4", length: int = 128
):
    recipe = load_recipe(
        ROOT / "recipes/dolly_gpt2.yaml",
        [f"model.name={model}", *FREE, *overrides],
    )
    return make_budget(
        recipe, prepared(40, length), tiny.byte_level(), strategy, devices.gpu_by_name(gpu)
    )


# Against reality; resident memory is compared in benchmarks/memory.py


@pytest.mark.parametrize("lora", ["null", "{r: 4, target_modules: [c_attn]}"], ids=["full", "lora"])
def test_fake_tensors_allocate_what_real_ones_do(small, lora):
    overrides = [f"model.name={small}", f"lora={lora}", "data.eval=null"]
    recipe = load_recipe(
        ROOT / "recipes/dolly_gpt2.yaml", [*overrides, "training.eval_strategy=no"]
    )
    batch = Collator("packed", 0)(list(prepared(8, 64).train.select(np.arange(8))))
    meta = meta_model(recipe, AutoConfig.from_pretrained(small))
    fake = step_memory.measure_step(recipe, meta, batch, None, None).peak()
    config = AutoConfig.from_pretrained(small)  # a new one: the first is of a packed model by now
    model = as_trained(recipe, AutoModelForCausalLM.from_config(config))
    tracker = StorageTracker()
    for weight in (*model.parameters(), *model.buffers()):
        is_adapter = weight.requires_grad and lora != "null"
        tracker.tag(weight, "adapters" if is_adapter else "weights")
    head = TrackedHead(model, tracker)
    with tracker:
        run_step(recipe, model, head, batch, None, None)
    real = tracker.step_memory().peak()
    assert sum(fake.values()) > 20 * 2**20
    for kind in storage_tracker.KINDS:
        assert fake[kind] == pytest.approx(real[kind], rel=0.02, abs=2**16), kind


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in memory.CASES if case.endswith("-256")])
def test_allocated_memory_is_what_the_budget_says(case, record_property):
    found = memory.run_worker(case, "cuda")
    record_property("budget", f"{found['budget']:.0f} MiB")
    record_property("measured", f"{found['measured']:.0f} MiB")
    assert found["budget"] == pytest.approx(found["measured"], rel=0.15)


def test_pages_show_the_budget_of_bloomz_1b1_on_a_t4(tmp_path):
    """To a tenth: what a step keeps changes with the libraries."""
    folder = write_config(tmp_path / "bloomz", BLOOMZ_1B1)
    recipe = load_recipe(
        ROOT / "recipes/harry_potter_bloomz_1b1_lora8bit.yaml", [f"model.name={folder}"]
    )
    assert (recipe.training.per_device_train_batch_size, recipe.data.max_length) == (8, 256)
    gpu = devices.gpu_by_name("t4")
    budget = make_budget(recipe, prepared(138, 256), tiny.byte_level(), SINGLE, gpu)
    shown = figures_of(budget_table(budget))
    assert shown["total"] > 1000
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    tables = [figures_of(text) for text in texts if "memory of a process" in text]
    assert len(tables) == 2  # English and Japanese
    for table in tables:
        assert table == pytest.approx(shown, rel=0.1)


def figures_of(table: Table | str) -> dict[str, float]:
    """{part: MiB} of a table as preview prints it."""
    if isinstance(table, Table):
        stream = io.StringIO()
        Console(file=stream, width=100).print(table)
        table = stream.getvalue()
    rows = re.findall(r"│ (\w+) +│ +([\d,.]+) │", table)
    return {part: float(figure.replace(",", "")) for part, figure in rows}


# How it follows the recipe


def test_parts_are_those_of_the_config(small):
    budget = budget_of(small, "training.gradient_accumulation_steps=2")
    numbers = 3000 * 512 + 1024 * 512 + 2 * (12 * 512**2 + 13 * 512) + 2 * 512
    assert budget.parts["weights"] == pytest.approx(4 * numbers, rel=1e-3)
    assert budget.parts["gradients"] == pytest.approx(4 * numbers, rel=1e-3)
    assert budget.parts["optimizer"] == pytest.approx(8 * numbers, rel=1e-3)
    assert budget.longest == (8, 8 * 127, 8 * 64)  # the last token predicts nothing
    assert (budget.steps, budget.tokens) == (
        9,
        3 * 40 * 128,
    )  # 3 epochs of 5 micro-batches, two of them a step


def test_an_adapter_needs_less_and_a_quantised_base_less_still(small):
    lora = "lora={r: 4, target_modules: [c_attn]}"
    full, plain, in_8, in_4 = (
        budget_of(small, "model.dtype=float32", *more)
        for more in (
            [],
            [lora],
            [lora, "model.quantization=8bit"],
            [lora, "model.quantization=4bit"],
        )
    )
    assert full.total > plain.total and plain.parts["optimizer"] == 2 * plain.parts["adapters"]
    linear = 2 * 12 * 512**2
    assert plain.parts["weights"] - in_8.parts["weights"] == pytest.approx(3 * linear, rel=0.01)
    assert plain.parts["weights"] - in_4.parts["weights"] == pytest.approx(3.48 * linear, rel=0.01)


def test_activations_shrink_with_checkpointing_and_grow_with_length(small):
    plain, checkpointed, long = (
        budget_of(small, *more, length=length).parts["activations"]
        for more, length in (
            ([], 512),
            (["training.activation_checkpointing=true"], 512),
            ([], 1024),
        )
    )
    assert checkpointed < 0.9 * plain and long > 1.5 * plain


@pytest.mark.parametrize(
    ("name", "sharded"),
    [
        ("ddp", []),
        ("zero1", ["optimizer"]),
        ("zero2", ["optimizer", "gradients"]),
        ("zero3", ["optimizer", "gradients", "weights"]),
        ("fsdp", ["optimizer", "gradients", "weights"]),
    ],
)
def test_a_process_holds_its_share(small, name, sharded):
    more = ["training.gradient_accumulation_steps=2"]
    alone, one_of = (
        budget_of(small, *more, strategy=strategy) for strategy in (SINGLE, Strategy(name, 4))
    )
    for part in ("weights", "gradients"):
        share = 4 if part in sharded else 1
        assert one_of.parts[part] == pytest.approx(alone.parts[part] / share, rel=1e-3)
    master = alone.parts["weights"] / 4 if name.startswith("zero") else 0
    optimizer = alone.parts["optimizer"] / (4 if "optimizer" in sharded else 1)
    assert one_of.parts["optimizer"] == pytest.approx(optimizer + master, rel=1e-3)
    assert one_of.parts["communication"] > 0 == alone.parts["communication"]


def test_the_verdict_is_about_the_device(small):
    budget = budget_of(small)
    verdicts = []
    for room in (1.3, 1.1, 1.01):
        device = devices.Device("a GPU", int(budget.total * room), 1e12, (7, 5))
        verdicts.append(dataclasses.replace(budget, device=device).verdict)
    assert verdicts == ["fits", "tight", "does not fit"]


def test_processes_share_the_memory_of_a_cpu_but_not_of_a_gpu(small):
    on_gpu = budget_of(small, strategy=Strategy("ddp", 4))
    assert on_gpu.available == devices.GPUS["t4"].memory
    assert (
        dataclasses.replace(on_gpu, device=devices.Device("a CPU", 4000, 1e9, None)).available
        == 1000
    )


def test_the_time_on_a_gpu_whose_speed_is_not_known_is_said_to_be_so(small, capsys):
    recipe = load_recipe(
        ROOT / "recipes/dolly_gpt2.yaml",
        [f"model.name={small}", "data.eval=null", "training.eval_strategy=no"],
    )
    times = []
    for peak in (0.0, 1e12):
        device = devices.Device("NVIDIA L40S", 44 * devices.GIB, peak, (8, 9))
        budget = make_budget(recipe, prepared(40, 128), tiny.byte_level(), SINGLE, device)
        print_budget(Console(width=200), budget, [])
        times += [line for line in capsys.readouterr().out.splitlines() if line.startswith("time ")]
    assert times[0] == "time     not known for this GPU"
    assert re.fullmatch(r"time     [\d.]+ \w+ to [\d.]+ \w+ of computing, .*", times[1])


def varied(lengths: list[int], responses: list[int]) -> Prepared:
    """Examples of these lengths, of which so many tokens at the end are a response."""
    labels = np.concatenate([np.arange(length) for length in lengths])
    labels = np.where(labels < np.repeat(np.subtract(lengths, responses), lengths), -100, 5)
    ids = np.full(len(labels), 5, np.int32)
    return Prepared(Examples(ids, labels, np.array(lengths), np.arange(len(lengths))), None, {}, "")


def seconds_of(model: Path, lengths: list[int], responses: list[int], *overrides: str) -> float:
    recipe = load_recipe(
        ROOT / "recipes/dolly_gpt2.yaml",
        [f"model.name={model}", "data.eval=null", "training.eval_strategy=no", *overrides],
    )
    found = make_budget(
        recipe, varied(lengths, responses), tiny.byte_level(), SINGLE, devices.gpu_by_name("t4")
    )
    return found.seconds[0]


@pytest.fixture
def by_flops_alone(monkeypatch):
    """As if launching a kernel took no time."""
    monkeypatch.setattr(budget_module, "LAUNCH", (0.0, 0.0))


def test_padding_takes_its_time(small, by_flops_alone):
    lengths, few = [200, *[20] * 7] * 4, [1] * 32
    packed, padded = (
        seconds_of(small, lengths, few, f"data.layout={layout}", "data.order=sequential")
        for layout in ("packed", "padded")
    )
    assert padded / packed == pytest.approx(8 * 200 / (200 + 7 * 20), rel=0.03)


def test_the_head_s_time_is_that_of_all_responses_and_not_of_the_longest_example(
    small, by_flops_alone
):
    short, long, none = (
        seconds_of(small, [200, *[20] * 31], responses)
        for responses in ([1] * 32, [199, *[1] * 31], [0] * 32)
    )
    assert (long - none) / (short - none) == pytest.approx((199 + 31) / 32)


def test_a_number_format_that_the_gpu_lacks_is_refused(small):
    with pytest.raises(UserError, match="only emulates it"):
        budget_of(small, "training.bf16=true", gpu="t4")


def test_an_adapter_that_training_would_refuse_has_no_budget(small):
    with pytest.raises(UserError, match=r"^lora\.target_modules: .* did you mean c_proj\?"):
        budget_of(small, "lora={r: 4, target_modules: [c_attn, c_porj]}")


def test_small_steps_on_a_fast_gpu_take_the_time_of_their_kernels(small):
    budget = budget_of(small, "training.per_device_train_batch_size=1", gpu="h100", length=16)
    assert budget.steps == 120
    assert budget.seconds[0] / budget.steps > 1e-3  # 0.03 ms by FLOPs alone
    assert budget.seconds[1] == pytest.approx(2 * budget.seconds[0])


def test_only_settings_that_are_enough_are_advised(small):
    recipe = load_recipe(
        ROOT / "recipes/dolly_gpt2.yaml",
        [f"model.name={small}", *FREE, "lora={r: 4, target_modules: [c_attn]}"],
    )

    def fits(changed) -> bool:
        return changed.training.per_device_train_batch_size <= 2

    found = enough(recipe, 8, 1, fits)
    assert found[0] == (
        "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=4"
    )
    assert found[1:] == [f"a data.max_length below {recipe.data.max_length}"]
    assert "training.activation_checkpointing=true" in enough(recipe, 8, 1, lambda _: True)


def test_an_adapter_is_advised_where_it_fits_and_fewer_tokens_where_the_weights_do(small, capsys):
    recipe = load_recipe(ROOT / "recipes/dolly_gpt2.yaml", [f"model.name={small}", *FREE])
    on_4_bits = "a lora section with model.quantization=4bit"
    found = enough(recipe, 1, 1, lambda changed: changed.lora is not None, False)
    assert found == ["a lora section"]
    found = enough(recipe, 1, 1, lambda changed: changed.model.quantization == "4bit", False)
    assert found == [on_4_bits]
    assert enough(recipe, 1, 1, lambda _: False, False) == []
    shorter = f"a data.max_length below {recipe.data.max_length}"
    assert enough(recipe, 1, 1, lambda _: False, True) == [shorter]
    budget = budget_of(small)
    rest = budget.total - budget.parts["activations"] - budget.parts["logits"]
    for room, expected in ((1.3, True), (1.1, False)):
        device = devices.Device("a GPU", int(rest * room), 1e12, (7, 5))
        changed = dataclasses.replace(budget, device=device)
        assert changed.fits_without_tokens is expected and changed.verdict == "does not fit"
    print_budget(Console(width=200), changed, [])
    assert "by this estimate enough: no one setting; more memory, or" in capsys.readouterr().out


# Devices and strategies


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("Tesla T4", 65e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, peak):
    assert devices.peak_of(name) == peak


# preview


def test_preview_prints_the_budget_of_the_gpu_that_is_named(tmp_path, call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # what --num_processes leaves here is taken back
    overrides = [f"training.output_dir={tmp_path}", "--gpu", "t4", "--num_processes", "2"]
    done = call(preview, "recipes/quickstart.yaml", *overrides)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert any("total" in line and "of 15,053 on T4" in line for line in lines)
    assert any(
        line.startswith("steps    1,020 of 2 x 1 x 8 = 16 examples (ddp, 2 processes)")
        for line in lines
    )
    assert "verdict  fits" in lines


def test_a_folder_with_a_tokenizer_alone_shows_rows_without_a_budget(tmp_path, call):
    tiny.byte_level().save_pretrained(tmp_path / "tokenizer")
    command = [
        "recipes/quickstart.yaml",
        "model.from_scratch=null",
        f"model.name={tmp_path / 'tokenizer'}",
    ]
    command += [f"training.output_dir={tmp_path / 'run'}"]
    looked = call(preview, *command)
    assert looked.code == 0 and "no budget: model.name: " in looked.out, looked.err
    assert (tmp_path / "run" / "preview" / "report.json").exists()
    asked = call(preview, *command, "--gpu", "t4")
    assert asked.code == 2 and asked.err.startswith("error: model.name: ")


# The memory that the header of a recipe names

FIGURES = re.compile(r"By src/preview.py, (\d+|an) \w+ of ([\d,]+) tokens takes? ([\d.]+) of the")
LAYERS = {"gpt2": "n_layer", "bloom": "n_layer", "llama": "num_hidden_layers"}


def llm_jp_3(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 99584,
        "max_position_embeddings": 4096,
    }


LLM_JP_1_3B = {
    "model_type": "gpt2",
    "n_embd": 2048,
    "n_inner": 8192,
    "n_layer": 24,
    "n_head": 16,
    "n_positions": 2048,
    "vocab_size": 50688,
}
# Of the model's config.json, or of its card, what decides shapes; and the GPU.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "dolly_gpt2": ({"model_type": "gpt2", "n_layer": 12}, "t4"),
    "dolly_ja_bloomz_560m": ({**BLOOMZ_1B1, "hidden_size": 1024}, "t4"),
    "dolly_ja_llm_jp_3_1.8b": (llm_jp_3(2048, 7168, 24, 16), "h100"),
    "dolly_ja_llm_jp_3_7.2b": (llm_jp_3(4096, 11008, 32, 32), "h100"),
    "dolly_ja_llm_jp_3_7.2b_lora4bit": (llm_jp_3(4096, 11008, 32, 32), "t4"),
    "harry_potter_bloomz_1b1_lora4bit": (BLOOMZ_1B1, "t4"),
    "harry_potter_bloomz_1b1_lora8bit": (BLOOMZ_1B1, "t4"),
    "oasst1_ja_llm_jp_1.3b": (LLM_JP_1_3B, "a100-40"),
    "oasst1_ja_llm_jp_1.3b_lora": (LLM_JP_1_3B, "t4"),
    "oasst1_ja_llm_jp_3_3.7b_lora": (llm_jp_3(3072, 8192, 28, 24), "t4"),
    "wikipedia_ja_llm_jp_3_1.8b": (llm_jp_3(2048, 7168, 24, 16), "h100"),
}
# With fewer layers than these, the peak would be in the output layer.
FIRST = {
    "dolly_ja_llm_jp_3_7.2b": 5,
    "dolly_ja_llm_jp_3_7.2b_lora4bit": 5,
    "wikipedia_ja_llm_jp_3_1.8b": 8,
}
STRATEGIES = {"dolly_ja_llm_jp_3_7.2b": Strategy("zero3", 8)}


@pytest.mark.parametrize("name", MODELS)
def test_the_header_names_the_memory_that_preview_finds(name, tmp_path):
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    count, length, gib = FIGURES.findall(text)[0]
    (config, gpu), strategy = MODELS[name], STRATEGIES.get(name, SINGLE)
    device = devices.gpu_by_name(gpu)
    assert f"of the {device.memory / 2**30:.1f} GiB" in text
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml", [f"model.name={tmp_path}"])
    examples = recipe.training.per_device_train_batch_size
    assert count == ("an" if examples == 1 else str(examples))
    assert length == f"{recipe.data.max_length:,}"
    found = gib_of(recipe, config, strategy, device, tmp_path, FIRST.get(name, 2))
    assert float(gib) == pytest.approx(found, rel=0.02)


def gib_of(recipe, config, strategy, device, folder: Path, first: int) -> float:
    """Of the longest examples that the recipe takes.

    Each layer adds the same: `first` of them and one more are enough to know of all.
    """
    layers, found = LAYERS[config["model_type"]], []
    for count in (first, first + 1):
        write_config(folder, {**config, layers: count})
        rows = prepared(100, recipe.data.max_length)
        budget = make_budget(recipe, rows, tiny.byte_level(), strategy, device)
        found.append(budget.total / 2**30)
    return found[0] + (config[layers] - first) * (found[1] - found[0])


def test_every_recipe_of_a_model_on_the_hub_names_its_memory():
    """Of this repository; a private one is left alone."""
    recipes = {file.removesuffix(".yaml") for file in listed_recipes()}
    assert {name for name in recipes if "dpo" not in name} - {"quickstart"} == MODELS.keys()
