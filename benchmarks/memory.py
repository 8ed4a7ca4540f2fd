"""The budget of src/preview.py beside what a run takes: resident memory (CPU), allocated (GPU).

python benchmarks/memory.py                      # every model, method and length, on the CPU
python benchmarks/memory.py --cases gpt2-full-64 bloom-lora8bit-256
python benchmarks/memory.py --device cuda --json benchmarks/results/memory_cuda.json

Every case is a process of its own. It trains a very small model of the same kind first, so that
nothing is left to import; measured is what the case then takes above that at its peak in training.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

MODELS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 30000},
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 20000,
    },
    "bloom": {
        "model_type": "bloom",
        "hidden_size": 384,
        "n_layer": 4,
        "n_head": 8,
        "vocab_size": 80000,
    },
}
SMALL = {
    "gpt2": {"n_layer": 1, "n_embd": 64},
    "llama": {"num_hidden_layers": 1, "hidden_size": 64},
    "bloom": {"n_layer": 1, "hidden_size": 64},
}
TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bloom": ["query_key_value"]}
METHODS = ("full", "lora", "lora8bit")
LENGTHS = (64, 256)
CASES = [
    f"{model}-{method}-{length}" for model in MODELS for method in METHODS for length in LENGTHS
]
BATCH, EXAMPLES = 8, 16
# glibc raises its threshold to the largest piece freed and keeps all pieces below it: up to
# half as much again stays resident, unused. With a fixed threshold what is freed is given back.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144"}


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(measure(*options.worker.split("-"), Path(options.folder))))
        return
    found = {}
    for case in options.cases:
        found[case] = run_worker(case, options.device)
        print(f"# {case}: {found[case]}", file=sys.stderr, flush=True)
    print(table(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(case: str, device: str) -> dict[str, float]:
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--worker",
            case,
            "--folder",
            folder,
            "--device",
            device,
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**environment, **MALLOC, **hidden}
        )
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [
        "| model, method, tokens of an example | budget MiB | measured MiB | budget / measured |",
        "|---|---|---|---|",
    ]
    for case, figures in found.items():
        budget, measured = figures["budget"], figures["measured"]
        lines.append(
            f"| {case.replace('-', ', ')} | {budget:.0f} | {measured:.0f} "
            f"| {budget / measured:.2f} |"
        )
    return "\n".join(lines)


def measure(kind: str, method: str, length: str, folder: Path) -> dict[str, float]:
    """One case, in this process: {budget, measured} in MiB."""
    import torch

    from finetuning.budget.step_memory import measure_step, meta_model
    from finetuning.model.precision import with_weight_format

    fields = {**MODELS[kind], **SMALL[kind], "vocab_size": 300}
    small = recipe_of(kind, method, 32, write_model(folder / "small", fields), folder)
    train(small, torch)
    recipe = recipe_of(
        kind, method, int(length), write_model(folder / "model", MODELS[kind]), folder
    )
    measured, trainer = train(recipe, torch)
    from transformers import AutoConfig

    batch = next(iter(trainer.get_train_dataloader()))
    formats = {"bf16": trainer.args.bf16, "fp16": trainer.args.fp16}
    base = with_weight_format(recipe, trainer.args.device, formats)
    recipe = recipe.model_copy(update={"model": base})
    model = meta_model(recipe, AutoConfig.from_pretrained(base.name))
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    dtype = recipe_dtype(trainer.args, torch)
    parts = measure_step(recipe, model, batch, dtype, capability).peak()
    sizes = {"budget": sum(parts.values()), "measured": measured, **parts}
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


def recipe_dtype(args, torch):
    """That of autocast."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def write_model(folder: Path, fields: dict) -> Path:
    """A folder with a random model; written by another process, lest its memory be counted."""
    code = (
        "import sys, json; from transformers import AutoConfig, AutoModelForCausalLM as M; "
        "config = AutoConfig.for_model(**json.loads(sys.argv[1])); "
        "M.from_config(config).save_pretrained(sys.argv[2])"
    )
    fields = {**fields, "bos_token_id": 0, "eos_token_id": 0}
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(fields), str(folder)],
        check=True,
        capture_output=True,
    )
    return folder


def recipe_of(kind: str, method: str, length: int, model: Path, folder: Path):
    from finetuning.recipe.recipe import load_recipe

    settings = {
        "model": {"name": str(model), "quantization": "8bit" if method == "lora8bit" else None},
        "data": {
            "path": "none",
            "reader": "dolly",
            "template": "question_answer",
            "max_length": length,
        },
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": BATCH,
            "save_strategy": "no",
        },
    }
    if method != "full":
        settings["lora"] = {"r": 8, "target_modules": TARGETS[kind]}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(settings))
    return load_recipe(file)


def train(recipe, torch):
    """(bytes at the peak of training above those before the model was there, the trainer)"""
    import numpy as np

    from finetuning.data.examples import Examples
    from finetuning.data.storage import Prepared
    from finetuning.launch.strategy import requested_strategy
    from finetuning.training.prepared_run import PreparedRun
    from finetuning.training.train import make_trainer

    length = recipe.data.max_length
    ids = np.random.default_rng(0).integers(5, 250, (EXAMPLES, length))
    labels = np.where(np.arange(length) < length // 2, -100, ids)  # the first half is prompt
    examples = Examples(ids.ravel(), labels.ravel(), np.full(EXAMPLES, length), np.arange(EXAMPLES))
    is_gpu = torch.cuda.is_available()
    gc.collect()  # the trainer before
    before = torch.cuda.memory_allocated() if is_gpu else resident("VmRSS")
    prepared = Prepared(examples, None, {"tokens": {"max": length}}, "")
    trainer = make_trainer(PreparedRun(recipe, requested_strategy(), tokenizer(), prepared))
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        for weight in (
            trainer.model.parameters()
        ):  # or the pages of the file that were read to quantise would count
            weight.data = weight.data.clone()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if is_gpu else resident("VmHWM")
    return peak - before, trainer


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def resident(field: str) -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


if __name__ == "__main__":
    main()
