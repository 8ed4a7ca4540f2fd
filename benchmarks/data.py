"""Data preparation and packing beside trl, beside the tokenizer alone, and for many lengths.

python benchmarks/data.py --data dolly.jsonl --tokenizer gpt2-folder

Preparation is everything from the file to ids and labels: read, render, tokenize, mask, cut. The
floor is one batch encoding of the same texts by the tokenizer. CPU seconds, best of the repeats.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "true"
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
from dolly import dolly_parser

from finetuning.data.bin_packing import pack_lengths
from finetuning.data.cache import prepare
from finetuning.data.readers import read_dolly
from finetuning.data.section import Data, Source
from finetuning.data.sources import load_rows
from finetuning.data.templates import TEMPLATES, MarkerTemplate
from finetuning.model.tokenizer import read_tokenizer

MAX_LENGTH = 512


def main() -> None:
    options = read_arguments()
    tokenizer = read_tokenizer(options.tokenizer)
    texts = [prompt + response for prompt, response in rendered(options.data, tokenizer.eos_token)]
    data = Data(
        path=options.data,
        reader="dolly",
        template="question_answer",
        max_length=MAX_LENGTH,
        overflow="cut",
    )

    floor, _ = best(options.repeats, lambda: tokenizer.backend_tokenizer.encode_batch_fast(texts))
    ours, prepared = best(options.repeats, lambda: prepare(data, tokenizer))
    theirs, dataset = best(1, lambda: trl_dataset(options.data, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        prepare(data, tokenizer, Path(folder))
        cached = min(wall(lambda: prepare(data, tokenizer, Path(folder))) for _ in range(3))

    print_times(len(texts), floor, {"trl": theirs, "ours": ours})
    print(f"\nours again, from the cache: {cached:.3f} s (wall)")
    print(f"ids and labels equal to trl's: {same(prepared.train, dataset)}\n")
    packing(prepared.train.lengths)


def read_arguments() -> argparse.Namespace:
    parser = dolly_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def print_times(rows: int, floor: float, seconds: dict[str, float]) -> None:
    """A line for each way to prepare the rows, and for encoding them in one batch, the floor."""
    heads = ["CPU s", "rows/s", "of one batch encoding", "of trl's path"]
    print(f"| preparation of {rows} rows | {' | '.join(heads)} |")
    print("|---|---|---|---|---|")
    for name, each in {**seconds, "one batch encoding (floor)": floor}.items():
        rate, faster = rows / each, seconds["trl"] / each
        print(
            f"| {name} | {each:.2f} | {rate:.0f} | {each / floor:.2f} times "
            f"| {faster:.1f} times faster |"
        )


def rendered(path: str, eos: str) -> list[tuple[str, str]]:
    """(prompt, response with end mark) of every row."""
    template = MarkerTemplate(TEMPLATES["question_answer"], eos)
    pairs = []
    for row in load_rows(Source(path=path, reader="dolly")).rows:
        segments = template.render(read_dolly(row))
        prompt = "".join(segment.text for segment in segments if not segment.is_response)
        pairs.append((prompt, "".join(segment.text for segment in segments if segment.is_response)))
    return pairs


def best(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the fastest call, and what it returned."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def wall(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def trl_dataset(path: str, tokenizer):
    """trl's own preparation of the same prompts and responses."""
    import datasets
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    pairs = rendered(path, tokenizer.eos_token)
    columns = {
        "prompt": [prompt for prompt, _ in pairs],
        "completion": [response for _, response in pairs],
    }
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1))
    settings = {
        "max_length": MAX_LENGTH,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = SFTConfig(output_dir=tempfile.mkdtemp(), **settings)
    dataset = datasets.Dataset.from_dict(columns)
    return SFTTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=dataset
    ).train_dataset


def same(examples, dataset) -> bool:
    theirs = dataset.with_format(None)
    return len(examples) == len(theirs) and all(
        ours["input_ids"].tolist() == row["input_ids"] and ours["labels"].tolist() == row["labels"]
        for ours, row in zip(examples, theirs, strict=True)
    )


def packing(lengths: np.ndarray) -> None:
    print("| packing into bins of 2,048 | CPU s | bins | real tokens in the slots |")
    print("|---|---|---|---|")
    for count in (len(lengths), 1_000_000, 10_000_000):
        drawn = (
            lengths if count == len(lengths) else np.random.default_rng(0).choice(lengths, count)
        )
        seconds, bins = best(2, lambda drawn=drawn: pack_lengths(drawn, 2048))
        share = drawn.sum() / (2048 * (bins.max() + 1))
        print(f"| {count:,} lengths | {seconds:.3f} | {bins.max() + 1:,} | {share:.2%} |")


if __name__ == "__main__":
    main()
