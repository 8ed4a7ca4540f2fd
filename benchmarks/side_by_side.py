"""Trainings beside each other: the same random model, each mode in a process of its own, a table.

Every run is a process of its own, the modes take turns, and the best of the repeats counts. On a
CPU one thread is used and CPU seconds are counted, which a busy machine changes least; on a GPU
seconds between two synchronisations, in the GPU's half precision (autocast, float32 weights).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dolly import dolly_parser

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


def parser_of(doc: str, modes: dict[str, str]) -> argparse.ArgumentParser:
    parser = dolly_parser(doc)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--modes", nargs="*", choices=modes)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--worker", choices=modes, help=argparse.SUPPRESS)
    return parser


def compare(
    names: dict[str, str],
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict],
) -> None:
    """Measures the modes of these names and prints the table; in a worker, one of them."""
    if options.worker:
        if options.device == "cpu":
            use_one_thread()
        print(json.dumps(measure(options)))
        return
    runs: dict[str, list[dict]] = {mode: [] for mode in names}
    for repeat in range(options.repeats):
        for mode in names:
            runs[mode].append(run_worker(mode))
            print(
                f"# {repeat + 1}/{options.repeats} {mode}: {runs[mode][-1]}",
                file=sys.stderr,
                flush=True,
            )
    best = {mode: min(found, key=lambda run: run["seconds"]) for mode, found in runs.items()}
    print(table(best, names, options))
    if options.json:
        Path(options.json).write_text(json.dumps(best, indent=1) + "\n")


def run_worker(mode: str) -> dict:
    """What the script that was started measures of this mode, in a process of its own."""
    command = [sys.executable, *sys.argv, "--worker", mode]
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


def table(best: dict[str, dict], names: dict[str, str], options: argparse.Namespace) -> str:
    first = next(iter(best.values()))
    unit = "CPU s" if options.device == "cpu" else "s"
    lines = [
        f"{options.model}, {options.method}, {first['device']}: {first['examples']}, "
        f"{first['tokens']} tokens, {first['responses']} of them response",
        "",
        f"| run | {unit} | faster than the first | response tokens/s | peak MiB "
        "| share of the first | losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, run in best.items():
        losses = " ".join(f"{loss:.6f}" for loss in run["losses"][:2])
        lines.append(
            f"| {names[mode]} | {run['seconds']:.2f} | {first['seconds'] / run['seconds']:.2f} | "
            f"{run['responses'] / run['seconds']:.0f} | {run['peak_mib']:.0f} | "
            f"{run['peak_mib'] / first['peak_mib']:.2f} | {losses} |"
        )
    return "\n".join(lines)


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
        """(seconds, MiB at the peak above what was there at the start)"""
        seconds = self.now() - self.since
        if self.device == "cuda":
            import torch

            return seconds, torch.cuda.max_memory_allocated() / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return seconds, (peak - self.resident) / 2**20


def figures(trainer, clock: Clock, examples) -> dict:
    """What was measured of a trainer that has just trained on these examples."""
    import torch

    seconds, peak = clock.stop()
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens": int(examples.sequence_lengths.sum()),
        "responses": int((examples.labels != -100).sum()),
        "device": torch.cuda.get_device_name() if clock.device == "cuda" else "cpu",
    }


def new_model(fields: dict, **settings):
    """The same random weights each time, without dropout: all modes do the same sums."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields, **DROPOUT[fields["model_type"]])
    return AutoModelForCausalLM.from_config(config, **settings)


def adapter_of(options: argparse.Namespace):
    """peft's config of the adapter; None where all weights are trained."""
    from peft import LoraConfig

    if options.method == "full":
        return None
    targets = LORA[options.model]
    return LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")


def settings_of(options: argparse.Namespace, batch: int) -> dict:
    """TrainingArguments of every mode."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
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


def half_format(device: str) -> dict[str, bool]:
    """That of the GPU, as a run has it that does not set it; none on a CPU."""
    import torch

    if device == "cpu":
        return {"bf16": False}
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    return {"bf16": has_bf16, "fp16": not has_bf16}


def use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def representative(examples, count: int, batch: int):
    """So many of the examples, in batches whose padding and response share are those of all."""
    import numpy as np

    tokens = examples.sequence_lengths.sum(1)
    responses = np.add.reduceat(examples.labels != -100, examples.ends - examples.lengths)

    def character(numbers: np.ndarray) -> np.ndarray:
        lengths = tokens[numbers]
        padded = examples.widths[numbers].reshape(-1, batch).max(1).sum() * batch
        return np.array(
            [padded / lengths.sum(), responses[numbers].sum() / lengths.sum(), lengths.mean() / 100]
        )

    everything = np.random.default_rng(0).permutation(len(examples))
    whole = character(everything[: len(everything) // batch * batch])
    draws = (np.random.default_rng(seed).permutation(len(examples))[:count] for seed in range(3000))
    return examples.select(
        min(draws, key=lambda numbers: np.abs(character(numbers) / whole - 1).max())
    )
