"""Training speed and memory beside trl and transformers: same rows, model, optimizer and losses.

python benchmarks/train.py --data dolly.jsonl --tokenizer gpt2-folder    # GPT-2, all weights, CPU
python benchmarks/train.py --model small --method full ...               # 4 layers x 256
python benchmarks/train.py --model bloom --method lora ...               # vocabulary 250,880
python benchmarks/train.py --device cuda --rows 800 --repeats 3 ...

Every run is a process of its own, the modes take turns, and the best of the repeats counts. On a
CPU one thread is used and CPU seconds are counted, which a busy machine changes least; on a GPU
seconds between two synchronisations, after some steps to warm up. The sample of rows is drawn so
that its padding and its share of response tokens are those of the whole data set.
"""

import argparse
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
}
DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
}
LORA = {"gpt2": ["c_attn"], "small": ["c_attn"], "bloom": ["query_key_value"]}
MODES = {
    "trl_padded": "trl, padded (the book's)",
    "trl_padding_free": "trl, padding_free",
    "trl_packing": "trl, packing bfd",
    "trainer": "transformers Trainer, padded, all logits",
    "ours_padded": "ours, padded",
    "ours_packed": "ours, packed",
}
BATCH = 8


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    modes = options.modes or [
        mode for mode in MODES if options.model != "bloom" or "pack" not in mode or "ours" in mode
    ]
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
    parser.add_argument("--warmup", type=int, default=0, help="steps not measured")
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
        f"{options.model}, {options.method}, {options.device}: {first['rows']} rows in batches of "
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
    import torch

    if options.device == "cpu":
        torch.set_num_threads(1)
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

    examples = sample(options)
    settings = dict(MODELS[options.model])
    kind = settings.pop("model_type")
    torch.manual_seed(0)
    # Without recurrent randomness all modes do the same sums.
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **settings, **DROPOUT[kind])
    )
    clock = Clock(options.warmup, options.device)

    class Steps(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            clock.start(0)

        def on_step_end(self, args, state, *others, **kwargs):
            clock.start(state.global_step)

    trainer = make_trainer(options, model, examples, [Steps()])
    trainer.train()
    seconds, peak = clock.stop()
    measured = list(examples)[options.warmup * BATCH :]
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": len(measured),
        "tokens": sum(len(example["input_ids"]) for example in measured),
        "responses": sum(int((example["labels"] != -100).sum()) for example in measured),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }


class Clock:
    """Seconds and peak memory from the end of the warm-up to the end."""

    def __init__(self, warmup: int, device: str) -> None:
        self.warmup, self.device = warmup, device

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, step: int) -> None:
        if step == self.warmup:
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
        "bf16": options.device == "cuda",
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
    special = {
        "trl_padding_free": {"padding_free": True, "max_length": None},
        "trl_packing": {"packing": True, "max_length": 512, "per_device_train_batch_size": 3},
    }.get(mode, {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None})
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
