"""Training speed and memory beside trl and transformers: same rows, model, optimizer and losses.

python benchmarks/train.py --data dolly.jsonl --tokenizer gpt2-folder    # GPT-2, all weights, CPU
python benchmarks/train.py --model small --method full ...               # 4 layers x 256
python benchmarks/train.py --model bloom --method lora ...               # vocabulary 250,880
python benchmarks/train.py --device cuda --rows 800 --warmup 10 --repeats 3 ...
python benchmarks/train.py --device cuda --rows 800 --warmup 10 --model llama \\
  --attention kernels-community/flash-attn2 ...                          # Liger's kernels too

Every run is a process of its own, the modes take turns, and the best of the repeats counts. On a
CPU one thread is used and CPU seconds are counted, which a busy machine changes least; on a GPU
seconds between two synchronisations, in the GPU's half precision (autocast, float32 weights), after
a training of some steps on the same rows, thrown away, in which kernels are compiled. The sample of
rows is drawn so that its padding and its share of response tokens are those of the whole data set.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

MODELS = {
    "gpt2": {"model_type": "gpt2"},
    "small": {"model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4},
    "bloom": {
        "model_type": "bloom",
        "hidden_size": 512,
        "n_layer": 4,
        "n_head": 8,
        "vocab_size": 250880,
    },
    "llama": {  # 1B, the one kind here that Liger has kernels for
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 50257,
        "tie_word_embeddings": True,
    },
}
DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "llama": {},
}
LORA = {
    "gpt2": ["c_attn"],
    "small": ["c_attn"],
    "bloom": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
}
MODES = {
    "trl_padded": "trl, padded (the book's)",
    "trl_padding_free": "trl, padding_free",
    "trl_packing": "trl, packing bfd",
    "trl_liger": "trl, padded, use_liger_kernel",
    "trainer": "transformers Trainer, padded, all logits",
    "ours_padded": "ours, padded",
    "ours_packed": "ours, packed",
}
# trl's settings of a mode. It packs into rows of 512 tokens, which hold about 3 examples.
SETTINGS = {
    "trl_padding_free": {"padding_free": True, "max_length": None},
    "trl_packing": {"packing": True, "max_length": 512, "per_device_train_batch_size": 3},
}
AS_THEY_ARE = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
BATCH = 8


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    modes = options.modes or [mode for mode in MODES if is_fair(mode, options)]
    runs: dict[str, list[dict]] = {mode: [] for mode in modes}
    for repeat in range(options.repeats):
        for mode in modes:
            runs[mode].append(run_worker(mode))
            print(
                f"# {repeat + 1}/{options.repeats} {mode}: {runs[mode][-1]}",
                file=sys.stderr,
                flush=True,
            )
    best = {mode: min(found, key=lambda run: run["seconds"]) for mode, found in runs.items()}
    print(table(best, options))
    if options.json:
        Path(options.json).write_text(json.dumps(best, indent=1) + "\n")


def is_fair(mode: str, options: argparse.Namespace) -> bool:
    """Whether model and device have what the mode is about.

    trl packs BLOOM's examples so that they see each other; Liger's kernels are Triton's.
    """
    if mode == "trl_liger":
        return options.device == "cuda" and options.model == "llama"
    return options.model != "bloom" or mode != "trl_packing"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="databricks/databricks-dolly-15k", help="dolly: Hub id or local file"
    )
    parser.add_argument(
        "--tokenizer", default="openai-community/gpt2", help="GPT-2's: Hub id or local folder"
    )
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--modes", nargs="*", choices=MODES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--warmup", type=int, default=0, help="steps of a training before")
    parser.add_argument("--attention", help="of trl's modes without padding, instead of SDPA")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(mode: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", mode]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{mode} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(best: dict[str, dict], options: argparse.Namespace) -> str:
    first = next(iter(best.values()))
    unit = "CPU s" if options.device == "cpu" else "s"
    lines = [
        f"{options.model}, {options.method}, {first['device']}: {first['rows']} rows in batches of "
        f"{BATCH}, {first['tokens']} tokens, {first['responses']} of them response",
        "",
        f"| run | {unit} | faster than the first | response tokens/s | peak MiB "
        "| share of the first | losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, run in best.items():
        losses = " ".join(f"{loss:.6f}" for loss in run["losses"][:2])
        lines.append(
            f"| {MODES[mode]} | {run['seconds']:.2f} | {first['seconds'] / run['seconds']:.2f} | "
            f"{run['responses'] / run['seconds']:.0f} | {run['peak_mib']:.0f} | "
            f"{run['peak_mib'] / first['peak_mib']:.2f} | {losses} |"
        )
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict:
    """One mode, in this process."""
    import numpy as np
    import torch
    from transformers import TrainerCallback

    if options.device == "cpu":
        torch.set_num_threads(1)

    examples = sample(options)
    if options.warmup:
        some = examples.select(np.arange(options.warmup * BATCH) % len(examples))
        make_trainer(options, new_model(options), some, []).train()
        gc.collect()
    clock = Clock(options.device)

    class Start(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            clock.start()

    trainer = make_trainer(options, new_model(options), examples, [Start()])
    trainer.train()
    seconds, peak = clock.stop()
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": len(examples),
        "tokens": len(examples.input_ids),
        "responses": int((examples.labels != -100).sum()),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }


def new_model(options: argparse.Namespace):
    """The same random weights each time, without dropout: all modes do the same sums."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(MODELS[options.model])
    kind = settings.pop("model_type")
    has_kernel = options.attention and options.worker in SETTINGS
    attention = {"attn_implementation": options.attention} if has_kernel else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, **DROPOUT[kind])
    return AutoModelForCausalLM.from_config(config, **attention)


class Clock:
    """Seconds and peak memory of a training; CPU seconds on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        import psutil
        import torch

        self.resident = psutil.Process().memory_info().rss
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.since = self.now()

    def stop(self) -> tuple[float, float]:
        seconds = self.now() - self.since
        if self.device == "cuda":
            import torch

            return seconds, torch.cuda.max_memory_allocated() / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return seconds, (peak - self.resident) / 2**20


def sample(options: argparse.Namespace):
    """Rows of dolly, in batches whose padding and response share are those of the whole."""
    import numpy as np

    from finetuning.data.cache import cache_folder, prepare
    from finetuning.data.section import Data
    from finetuning.model.tokenizer import read_tokenizer

    length = options.max_length if options.model != "bloom" else min(256, options.max_length)
    # Longer rows are cut, as trl does.
    data = Data(
        path=options.data,
        reader="dolly",
        template="question_answer",
        max_length=length,
        overflow="cut",
    )
    examples = prepare(data, read_tokenizer(options.tokenizer), cache_folder()).train
    responses = np.add.reduceat(examples.labels != -100, examples.ends - examples.lengths)

    def character(numbers: np.ndarray) -> np.ndarray:
        lengths = examples.lengths[numbers]
        padded = lengths.reshape(-1, BATCH).max(1).sum() * BATCH
        return np.array(
            [padded / lengths.sum(), responses[numbers].sum() / lengths.sum(), lengths.mean() / 100]
        )

    everything = np.random.default_rng(0).permutation(len(examples))
    whole = character(everything[: len(everything) // BATCH * BATCH])
    draws = (
        np.random.default_rng(seed).permutation(len(examples))[: options.rows]
        for seed in range(3000)
    )
    return examples.select(
        min(draws, key=lambda numbers: np.abs(character(numbers) / whole - 1).max())
    )


def make_trainer(options: argparse.Namespace, model, examples, callbacks):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from finetuning.data.batching import Collator, ExampleSet
    from finetuning.model.attention import use_packed_attention
    from finetuning.model.loading import fuse_gelu
    from finetuning.training.trainer import ResponseTrainer

    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1 if options.device == "cpu" else 50,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": options.device == "cpu",
        **half_format(options.device),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=LORA[options.model], task_type="CAUSAL_LM")
    lora = lora if options.method == "lora" else None
    dataset = as_dataset(examples)
    mode = options.worker
    if mode == "trainer":
        if lora:
            model = get_peft_model(model, lora)
        arguments = TrainingArguments(**common)
        return Trainer(
            model,
            arguments,
            data_collator=plain_collator,
            train_dataset=dataset,
            callbacks=callbacks,
        )
    own = mode.startswith("ours")
    special = SETTINGS.get(mode, AS_THEY_ARE)
    if mode == "trl_liger":
        special = {**special, "use_liger_kernel": True}
    from finetuning.model.tokenizer import read_tokenizer

    shared = {
        "model": model,
        "args": SFTConfig(**{**common, **special, "logging_nan_inf_filter": not own}),
        "processing_class": read_tokenizer(options.tokenizer),
        "train_dataset": dataset.with_format(None) if mode == "trl_packing" else dataset,
        "peft_config": lora,
        "callbacks": callbacks,
    }
    if not own:
        return SFTTrainer(**shared)
    layout = mode.removeprefix("ours_")
    fuse_gelu(model)
    if layout == "packed":
        use_packed_attention(model)
    if shared.pop("peft_config"):
        shared["model"] = get_peft_model(model, lora)
    shared["train_dataset"] = ExampleSet(examples)
    return ResponseTrainer(**shared, data_collator=Collator(layout, 0), order="sequential")


def half_format(device: str) -> dict[str, bool]:
    """That of the GPU, as a run without a word about it has it; none on a CPU."""
    import torch

    if device == "cpu":
        return {"bf16": False}
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    return {"bf16": has_bf16, "fp16": not has_bf16}


def as_dataset(examples):
    """The examples as a datasets.Dataset (trl takes no other), without copying their tokens."""
    import pyarrow
    from datasets import Dataset

    offsets = pyarrow.array([0, *examples.ends.tolist()], pyarrow.int64())
    columns = {
        name: pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(getattr(examples, name)))
        for name in ("input_ids", "labels")
    }
    return Dataset(pyarrow.table(columns)).with_format("numpy")


def plain_collator(examples):
    """Padded input_ids, labels and attention_mask, as any tutorial has them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = (
        [torch.as_tensor(example[name]).long() for example in examples]
        for name in ("input_ids", "labels")
    )
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


if __name__ == "__main__":
    main()
