"""Preparation of any number of rows: seconds and memory, cold and from the cache.

python benchmarks/rows.py --rows 300000 --data dolly.jsonl --tokenizer gpt2-folder
python benchmarks/rows.py --rows 300000 ... --source ../before/src    # of another checkout

The rows are those of dolly, as often as needed, each with its number in the prompt. Memory is that
of all processes of a preparation together: `own` of anonymous pages, `mapped` of files, of which a
page that several processes map counts once.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from dolly import dolly_parser

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from finetuning.data.section import Source
from finetuning.data.sources import load_rows

SOURCE = Path(__file__).parents[1] / "src"
PREPARE = """
import json, os, resource, sys, time
from pathlib import Path
rows, tokenizer, cache = sys.argv[1:]
from finetuning.data.cache import prepare
from finetuning.data.section import Data
from finetuning.model.tokenizer import read_tokenizer
tokenizer = read_tokenizer(tokenizer)
data = Data(path=rows, reader="dolly", template="question_answer", overflow="cut")
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
started, before = time.perf_counter(), cpu()
prepared = prepare(data, tokenizer, Path(cache))
wall = time.perf_counter() - started
used = cpu() - before
# Every page is read.
tokens = [int(array.sum()) for array in vars(prepared.train).values() if array is not None]
print(json.dumps([wall, used]), flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = dolly_parser(__doc__)
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--source", type=Path, default=SOURCE, help="src/ of another checkout")
    options = parser.parse_args()
    print("| rows | run | wall s | CPU s | own MiB | mapped MiB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        write_rows(options.data, options.rows, rows)
        for name, count in (("cold", 1), ("warm", 1), ("warm, each of 4", 4)):
            wall, cpu, own, mapped = measure(options, rows, Path(folder, "cache"), count)
            print(
                f"| {options.rows:,} | {name} | {wall:.2f} | {cpu:.2f} | {own:.0f} | {mapped:.0f} |"
            )


def write_rows(dolly: str, count: int, file: Path) -> None:
    lines = load_rows(Source(path=dolly, reader="dolly")).rows
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = lines[number % len(lines)]
            changed = {**row, "instruction": f"{number}. {row['instruction']}"}
            stream.write(json.dumps(changed, ensure_ascii=False) + "\n")


def measure(
    options: argparse.Namespace, rows: Path, cache: Path, count: int
) -> tuple[float, float, float, float]:
    """Slowest wall and CPU seconds, peak own and mapped MiB, of one of `count` processes."""
    command = [sys.executable, "-c", PREPARE, rows, options.tokenizer, cache]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(options.source)}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    started = time.perf_counter()
    peak_own = peak_mapped = 0.0
    trees = [psutil.Process(process.pid) for process in processes]
    while True:
        own, mapped = map(sum, zip(*map(memory_of, trees), strict=True))
        peak_own, peak_mapped = max(peak_own, own), max(peak_mapped, mapped)
        if all(has_printed(process) for process in processes):
            break
        # Of a long preparation rarely: each look costs milliseconds of the cores that it uses.
        time.sleep(min(2, 0.05 + (time.perf_counter() - started) / 100))
    seconds = [json.loads(process.stdout.readline()) for process in processes if process.stdout]
    for process in processes:
        process.communicate("")
    wall, cpu = (max(column) for column in zip(*seconds, strict=True))
    return wall, cpu, peak_own / count, peak_mapped / count


def has_printed(process: "subprocess.Popen[str]") -> bool:
    return bool(select.select([process.stdout], [], [], 0)[0])


def memory_of(process: psutil.Process) -> tuple[float, float]:
    """(own, mapped) MiB of a process and those that it has started."""
    own = mapped = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            text = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        sizes = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        own += sizes["Pss_Anon:"] / 1024
        mapped += (sizes["Pss_File:"] + sizes["Pss_Shmem:"]) / 1024
    return own, mapped


if __name__ == "__main__":
    main()
