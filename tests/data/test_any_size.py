"""Rows of any number: blocks and processes change the time, memory does not grow, and whatever
happens on the way, the next start is right."""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tiny import byte_level

from finetuning.data import cache, loading, prepare, storage, workers
from finetuning.data.section import Data
from finetuning.errors import UserError

TOKENIZER = byte_level()


def rows_of(count):
    """Rows of many lengths: invalid ones, ones that are too long, and ones without a response."""
    for number in range(count):
        yield {
            "prompt": 5 if number % 17 == 3 else f"id{number} " + "word " * (number % 5),
            "response": "長い answer " * (number % 9),
        }


@pytest.fixture
def data(tmp_path):
    return data_of(tmp_path / "rows.jsonl", 300)


def data_of(file, count, **settings):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(count)))
    settings = {"eval": {"fraction": 0.1}, "max_length": 100, "invalid_rows": "drop", **settings}
    return Data(path=str(file), reader="prompt_response", template="question_answer", **settings)


def plain(prepared):
    parts = [vars(part) for part in (prepared.train, prepared.eval)]
    arrays = [
        {name: array.tolist() for name, array in part.items() if array is not None}
        for part in parts
    ]
    return arrays, prepared.report, prepared.fingerprint


def with_processes(data, count):
    return data.model_copy(update={"num_proc": count})


# Blocks and processes


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(("rows", "text"), [(1, 2**22), (7, 2**22), (2048, 50)])
def test_blocks_and_processes_change_no_example(data, monkeypatch, processes, rows, text):
    whole = plain(cache.prepare(with_processes(data, 1), TOKENIZER))
    assert whole[1]["dropped"].keys() == {"invalid", "overflow"}
    monkeypatch.setattr(loading, "BLOCK_ROWS", rows)
    monkeypatch.setattr(loading, "BLOCK_TEXT", text)
    in_blocks = plain(cache.prepare(with_processes(data, processes), TOKENIZER))
    places = [set(report.pop("places")) for report in (whole[1], in_blocks[1])]
    assert places[0] == places[1]
    assert in_blocks == whole


def test_an_error_in_another_process_is_the_error_of_the_first_row_that_has_one(data, monkeypatch):
    monkeypatch.setattr(loading, "BLOCK_ROWS", 2)
    data = data.model_copy(update={"num_proc": 2, "invalid_rows": "error"})
    with pytest.raises(UserError, match=r"rows\.jsonl: row 3: column prompt: expected text"):
        cache.prepare(data, TOKENIZER)


def test_results_come_in_order_and_few_items_are_taken_ahead():
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    results = workers.map_in_order(lambda number: (number * 2, os.getpid()), items(), 2)
    doubled, process = next(results)
    assert doubled == 0 and process != os.getpid()
    assert len(taken) <= 2 * workers.WAITING + 2
    assert [each for each, _ in results] == list(range(2, 100, 2))


def test_a_process_that_is_killed_is_told_in_one_line():
    def work(number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match=r"was killed, .* memory .* data\.num_proc=1"):
        list(workers.map_in_order(work, iter(range(9)), 2))


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Killed, it cannot tell them: they would wait for work for ever."""

    def work(number):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    child = os.fork()
    if not child:
        list(workers.map_in_order(work, iter(range(9)), 2))
        os._exit(0)
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: not any(is_running(file.name) for file in tmp_path.iterdir()))


def until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# Memory


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "BLOCK_ROWS", 100)
    cache.prepare(data_of(tmp_path / "first.jsonl", 300, num_proc=1), TOKENIZER)
    peaks = []
    for count in (1000, 4000):
        data = data_of(tmp_path / f"{count}.jsonl", count, num_proc=1)
        tracemalloc.start()
        prepared = cache.prepare(data, TOKENIZER)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(prepared.train) > count / 2
    assert peaks[1] < 1.3 * peaks[0]


MAPPED = """
import sys
import numpy as np
array = np.load(sys.argv[1], "r")
print(int(array.sum()), flush=True)
sys.stdin.read()
"""


def test_the_pages_of_two_processes_are_there_once(tmp_path):
    data = data_of(tmp_path / "rows.jsonl", 4000)
    prepared = cache.prepare(data, TOKENIZER, tmp_path / "cache")
    total = int(prepared.train.input_ids.sum())  # touches every page
    (file,) = tmp_path.glob("cache/*/train.input_ids.npy")
    other = subprocess.Popen(
        [sys.executable, "-c", MAPPED, file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert int(other.stdout.readline()) == total
    for process in (os.getpid(), other.pid):
        found = mapping(process, file)
        assert found["Rss"] > 100
        assert found["Pss"] <= 0.6 * found["Rss"]
        assert found["Private_Dirty"] == 0
    other.communicate("")


def mapping(process, file):
    """{name: KiB} of /proc/<process>/smaps for the mapped file."""
    _, _, behind = Path(f"/proc/{process}/smaps").read_text().partition(f"{file}\n")
    return {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", behind, re.M)[:12]}


# Interrupted, full, changed

INSTANTS = [
    *((storage.GrowingArrays, "append", call) for call in (1, 2, 5)),
    (storage.GrowingArrays, "mapped", 1),
    *((prepare, "write_examples", call) for call in (1, 2)),
    *((storage, "write_array", call) for call in (1, 2, 4, 8)),
    (prepare, "seal", 1),
    (storage, "described", 3),
    (Path, "rename", 1),
]


@pytest.mark.parametrize(("owner", "name", "call"), INSTANTS)
def test_killed_at_any_instant_the_next_start_is_right(data, tmp_path, owner, name, call):
    child = os.fork()
    if not child:
        loading.BLOCK_ROWS = 50
        kill_at(owner, name, call)
        cache.prepare(with_processes(data, 2), TOKENIZER, tmp_path / "cache")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert plain(cache.prepare(data, TOKENIZER, tmp_path / "cache")) == plain(
        cache.prepare(data, TOKENIZER)
    )
    assert not list(tmp_path.glob("cache/*.tmp"))


def kill_at(owner, name, call):
    """This process kills itself when the function is called for the so-manieth time."""
    whole, calls = getattr(owner, name), []

    def counted(*arguments, **settings):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **settings)

    setattr(owner, name, counted)


@pytest.mark.parametrize("file_name", ["input_ids.growing", "eval.labels.npy", storage.INDEX])
def test_a_full_disk_is_one_line_and_leaves_nothing(data, tmp_path, monkeypatch, file_name):
    def open_private(file):
        return open("/dev/full" if file.name == file_name else file, "wb")

    monkeypatch.setattr(storage, "open_private", open_private)
    with pytest.raises(UserError, match=r"cache: No space left on device; .*HF_HOME"):
        cache.prepare(data, TOKENIZER, tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_rows_that_change_while_they_are_read_are_refused(data, tmp_path, monkeypatch):
    whole = cache.build

    def build(*arguments):
        whole(*arguments)
        data_of(Path(data.path), 301)

    monkeypatch.setattr(cache, "build", build)
    with pytest.raises(UserError, match="the rows were changed while they were read"):
        cache.prepare(data, TOKENIZER, tmp_path / "cache")
    monkeypatch.undo()
    again = cache.prepare(data, TOKENIZER, tmp_path / "cache")
    assert again.report["rows"]["loaded"] == 301


# A large file is not read to find that it is the same


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """remembered_digest of a file of any size and age, and what it has read."""
    read = []
    monkeypatch.setattr(cache, "NOTED_SIZE", 0)
    monkeypatch.setattr(cache, "SETTLED", -1)
    whole = cache.digest_of
    monkeypatch.setattr(cache, "digest_of", lambda file: read.append(file.name) or whole(file))
    return lambda file: cache.remembered_digest(tmp_path, file), read


def test_a_file_is_read_again_when_it_was_touched_and_not_before(tmp_path, noted):
    digest, read = noted
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    first = digest(file)
    assert digest(file) == first and read == ["rows.jsonl"]
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_text("two")
    os.utime(file, ns=times)  # the same size and time of change
    assert digest(file) != first and len(read) == 2


def test_a_file_that_was_changed_just_now_is_not_noted(tmp_path, noted, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", 10**12)
    digest, read = noted
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    assert digest(file) == digest(file)
    assert len(read) == 2


def test_arrays_are_those_that_were_written(tmp_path):
    growing = storage.GrowingArrays(tmp_path)
    parts = [
        np.arange(5, dtype=np.int32),
        np.arange(0, dtype=np.int32),
        np.arange(7, 9, dtype="i4"),
    ]
    for part in parts:
        growing.append({"a": part, "empty": part[:0] > 0})
    arrays = growing.mapped()
    assert arrays["a"].tolist() == [0, 1, 2, 3, 4, 7, 8] and arrays["a"].dtype == np.int32
    assert arrays["empty"].tolist() == [] and arrays["empty"].dtype == bool
    assert not list(tmp_path.iterdir())


def test_the_benchmark_of_rows_prepares_them(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "rows.py"))
    row = {"instruction": "Hi", "context": "", "response": "Hello"}
    (tmp_path / "dolly.jsonl").write_text(json.dumps(row) + "\n")
    rows, tokenizer, cache = (str(tmp_path / name) for name in ("rows.jsonl", "tokenizer", "cache"))
    benchmark["write_rows"](str(tmp_path / "dolly.jsonl"), 3, Path(rows))
    TOKENIZER.save_pretrained(tokenizer)
    monkeypatch.setattr(sys, "argv", ["-c", rows, tokenizer, cache])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    exec(benchmark["PREPARE"], {})
    wall, cpu = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert wall > 0 and cpu > 0 and list(Path(cache).glob("*/train.input_ids.npy"))
