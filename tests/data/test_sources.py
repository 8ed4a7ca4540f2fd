"""Rows are what the files say, whatever the kind of file; a row's place can be told."""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from finetuning.data import json_text
from finetuning.data.section import Source
from finetuning.data.sources import fingerprint, load_rows, looks_local, stream_rows
from finetuning.errors import UserError

ROWS = [
    {"prompt": "首都は？\nOne word.", "response": 'Tokyo, "東京"'},
    {"prompt": "a\u2028b", "response": ""},
    {"prompt": " 3 ", "response": "null"},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
CSV = 'prompt,response\r\n"首都は？\nOne word.","Tokyo, ""東京"""\r\na\u2028b,\r\n" 3 ",null\r\n'


def parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows, new=pyarrow.ipc.new_stream):
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def write(file, content):
    content = content if isinstance(content, bytes) else content.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(PACK.get(file.suffix.lower(), bytes)(content))
    return Source(path=str(file))


KINDS = {
    "rows.json": json.dumps(ROWS, indent=2),
    "ascii.json": json.dumps(ROWS, ensure_ascii=True),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "rows.jsonl": LINES,
    "blank_lines.jsonl": "\n" + LINES.replace("\n", "\n\n  \n"),
    "line_feeds_of_windows.jsonl": LINES.replace("\n", "\r\n"),
    "no_last_line_feed.jsonl": LINES.rstrip(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "lines_under_the_name.json": LINES,
    "rows.csv": CSV,
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "UPPER.JSONL": LINES,
    "rows.ndjson": LINES,
    "array.jsonl": json.dumps(ROWS),
    "indented_array.jsonl": json.dumps(ROWS, indent=2),
    "data.json": json.dumps({"version": "1", "data": ROWS}),
    "indented_data.json": json.dumps({"data": ROWS}, indent=2) + "\n\n",
    "train.json": json.dumps({"train": ROWS}) + "\n\n",
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "rows.tsv": CSV.replace("prompt,response", "prompt\tresponse")
    .replace('","', '"\t"')
    .replace("b,", "b\t")
    .replace('",null', '"\tnull'),
    "semicolon.csv": CSV.replace("prompt,response", "prompt;response")
    .replace('","', '";"')
    .replace("b,", "b;")
    .replace('",null', '";null'),
    "rows.arrow": arrow(ROWS),
    "file.arrow": arrow(ROWS, pyarrow.ipc.new_file),
    "rows.parquet": parquet(ROWS),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, suffix):
    loaded = load_rows(write(tmp_path / f"{name}{suffix}", KINDS[name]))
    assert loaded.rows == ROWS
    assert loaded.files == [(str(tmp_path / f"{name}{suffix}"), 3)]


def test_rows_may_have_columns_of_their_own(tmp_path):
    rows = [{"a": 1}, {"b": [{"c": None}], "a": 2.5}, {}]
    assert load_rows(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))).rows == rows


def test_parquet_keeps_lists_numbers_and_nothing(tmp_path):
    rows = [
        {"turns": [{"from": "human", "value": "a"}], "n": 1, "x": None},
        {"turns": [], "n": 2, "x": 0.5},
    ]
    assert load_rows(write(tmp_path / "rows.parquet", parquet(rows))).rows == rows


def test_a_csv_field_may_be_longer_than_a_book(tmp_path):
    long = "word " * 100_000
    assert load_rows(write(tmp_path / "rows.csv", f"a,b\n1,{long}\n")).rows == [
        {"a": "1", "b": long}
    ]


def test_csv_lines_may_end_in_any_way_and_those_inside_quotes_stay_as_they_are(tmp_path):
    rows = [{"a": "1", "b": "2\r\n3"}, {"a": "4", "b": "5\r6"}]
    for end in ("\n", "\r\n", "\r"):
        content = end.join(["a,b", '1,"2\r\n3"', '4,"5\r6"', ""])
        assert load_rows(write(tmp_path / "rows.csv", content)).rows == rows


def test_a_csv_quote_that_is_not_closed_does_not_swallow_the_rows_below(tmp_path):
    with pytest.raises(UserError, match=r"rows\.csv: line 3: unexpected end of data"):
        load_rows(write(tmp_path / "rows.csv", 'a,b\n1,"x\n2,y\n'))


def test_two_csv_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="line 1: two columns have the same name: a, b, a"):
        load_rows(write(tmp_path / "rows.csv", "a,b,a\n1,2,3\n"))


@pytest.mark.parametrize("flipped", [4, 12, 60, 200])
def test_a_damaged_parquet_file_is_refused(tmp_path, flipped):
    content = bytearray(parquet([{"a": f"row {number}"} for number in range(100)]))
    content[flipped : flipped + 4] = b"\xff" * 4
    with pytest.raises(UserError, match=r"rows\.parquet: is not parquet: \w+"):
        load_rows(write(tmp_path / "rows.parquet", bytes(content)))


# Folders


def folder_of(tmp_path, *names):
    """A folder in which every file has one row, its own name."""
    for name in names:
        write(tmp_path / "data" / name, json.dumps({"name": name}))
    return str(tmp_path / "data")


def names_in(path, split="train"):
    return [row["name"] for row in load_rows(Source(path=path, split=split)).rows]


def test_a_folder_with_split_files_gives_the_split_that_is_asked_for(tmp_path):
    path = folder_of(
        tmp_path, "train-00001.jsonl", "train-00000.jsonl", "test.jsonl.gz", "my_validation.json"
    )
    assert names_in(path) == ["train-00000.jsonl", "train-00001.jsonl"]
    assert names_in(path, "test") == ["test.jsonl.gz"]
    assert names_in(path, "validation") == ["my_validation.json"]


def test_split_folders_and_split_names_of_several_words_are_found(tmp_path):
    path = folder_of(
        tmp_path, "en/train/a.jsonl", "en/test/a.jsonl", "ja/train/b.jsonl", "test_gen/c.jsonl"
    )
    assert names_in(path) == ["en/train/a.jsonl", "ja/train/b.jsonl"]
    assert names_in(path, "test_gen") == ["test_gen/c.jsonl"]


def test_a_folder_whose_files_name_no_split_is_all_of_it_train(tmp_path):
    path = folder_of(tmp_path, "b.jsonl", "a.json", "more/c.jsonl")
    write(tmp_path / "data" / "README.md", "not data")
    assert names_in(path) == ["a.json", "b.jsonl", "more/c.jsonl"]


@pytest.mark.parametrize(
    "name", ["latest.jsonl", "retrieval.jsonl", "devices.json", "invalid/a.json", "strain.json"]
)
def test_a_word_that_holds_the_name_of_a_split_names_none(tmp_path, name):
    assert names_in(folder_of(tmp_path, name)) == [name]


def test_hidden_files_and_those_about_the_data_are_no_data(tmp_path):
    hidden = [".ipynb_checkpoints/rows-checkpoint.jsonl", "more/.cache/a.jsonl", ".train.jsonl"]
    about = ["dataset_infos.json", "more/dataset_info.json", "state.json", "dataset_dict.json"]
    path = folder_of(tmp_path / ".mine", "rows.jsonl", *hidden, *about)
    write(tmp_path / ".mine" / "data" / "._rows.jsonl", b"\x00\x05\x16\x07\xff")
    assert names_in(path) == ["rows.jsonl"]


def test_a_folder_of_hidden_files_alone_has_no_data(tmp_path):
    with pytest.raises(UserError, match="no data file in this folder"):
        names_in(folder_of(tmp_path, ".rows.jsonl", "state.json"))


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["a.jsonl", "b.jsonl"], "test"),
        (["val.jsonl", "other.jsonl"], "train"),
        (["my_validation-0.jsonl", "other.jsonl"], "train"),
        (["evaluation/a.jsonl", "other.jsonl"], "train"),
        (["testset.jsonl", "other.jsonl"], "train"),
        (["test.jsonl", "other.jsonl"], "train"),
        (["test/a.jsonl", "other/a.jsonl"], "train"),
        (["train.jsonl", "test.jsonl"], "validation"),
        (["contest.jsonl", "train.jsonl"], "test"),
    ],
)
def test_a_split_that_no_file_bears_is_refused_with_the_files_there_are(tmp_path, names, split):
    with pytest.raises(UserError, match=f"no file of split '{split}'; found") as caught:
        names_in(folder_of(tmp_path, *names), split)
    assert all(name.split("/")[-1] in str(caught.value) for name in names)


def test_a_word_that_holds_the_name_of_a_split_is_not_that_split(tmp_path):
    path = folder_of(tmp_path, "train.jsonl", "constraint.jsonl")
    assert names_in(path) == ["train.jsonl"]


def test_a_file_has_no_other_split_than_train(tmp_path):
    source = write(tmp_path / "rows.jsonl", LINES)
    with pytest.raises(UserError, match="no split 'test' in a file"):
        load_rows(source.model_copy(update={"split": "test"}))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz"])
def test_a_file_of_several_splits_gives_the_one_that_is_asked_for(tmp_path, name, indent):
    splits = {"train": ROWS, "validation": ROWS[:2]}
    source = write(tmp_path / name, json.dumps(splits, indent=indent))
    for split, rows in splits.items():
        assert load_rows(source.model_copy(update={"split": split})).rows == rows
    with pytest.raises(UserError, match="no split 'test' in a file"):
        load_rows(source.model_copy(update={"split": "test"}))


def test_a_file_of_splits_without_train_names_those_there_are(tmp_path):
    source = write(tmp_path / "rows.json", json.dumps({"dev": ROWS, "test": ROWS}))
    with pytest.raises(UserError, match=r"rows\.json: no split 'train'; found dev, test"):
        load_rows(source)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": [{"content": "a"}], "completion": [{"content": "b"}]},
        {"messages": [{"role": "user"}], "test": [{"content": "b"}]},
        {"a": [1, 2], "b": 3},
        {"a": [1, 2], "b": [3]},
        {"data": "a"},
        {},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_one_object_is_one_row_if_it_is_no_table(tmp_path, row, indent):
    source = write(tmp_path / "row.json", json.dumps(row, indent=indent))
    assert load_rows(source).rows == [row]


def test_a_broken_line_is_named_wherever_it_stands(tmp_path):
    for number in (1, 2, 3):
        lines = LINES.split("\n")
        lines[number - 1] = '{"prompt": '
        with pytest.raises(UserError, match=rf"rows\.jsonl:{number}: is not JSON"):
            load_rows(write(tmp_path / "rows.jsonl", "\n".join(lines)))


def test_a_comma_in_quotes_is_not_what_stands_between_columns(tmp_path):
    rows = [{"a, b, c": "1", "d": "2"}]
    assert load_rows(write(tmp_path / "rows.csv", '"a, b, c";d\n1;2\n')).rows == rows
    assert load_rows(write(tmp_path / "rows.csv", "text\none; two\n")).rows == [
        {"text": "one; two"}
    ]


def test_what_save_to_disk_writes_is_read(tmp_path):
    splits = {name: Dataset.from_list(rows) for name, rows in (("train", ROWS), ("test", ROWS[:1]))}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert load_rows(Source(path=str(tmp_path / "both"))).rows == ROWS
    assert load_rows(Source(path=str(tmp_path / "both"), split="test")).rows == ROWS[:1]
    splits["train"].save_to_disk(tmp_path / "one")
    write(tmp_path / "one" / "cache-0123.arrow", arrow(ROWS[:1]))  # what Dataset.map leaves there
    assert load_rows(Source(path=str(tmp_path / "one"))).rows == ROWS


@pytest.mark.parametrize("damaged", [b"", b"ARROW1\0\0", arrow(ROWS)[:100], b"x" * 100])
def test_a_damaged_arrow_file_is_refused(tmp_path, damaged):
    with pytest.raises(UserError, match=r"rows\.arrow: is not Arrow: \w+"):
        load_rows(write(tmp_path / "rows.arrow", damaged))


# The configs of README.md


def readme(folder, configs):
    front = json.dumps({"license": "mit", "configs": configs})  # JSON is YAML
    write(folder / "README.md", f"---\n{front}\n---\n# A data set\n")


def test_a_local_copy_of_a_hub_data_set_has_the_files_that_its_readme_names(tmp_path):
    path = folder_of(tmp_path, "a.jsonl", "b.jsonl", "more/c.jsonl", "more/d.jsonl", "e.jsonl")
    splits = [{"split": "train", "path": "more/*.jsonl"}, {"split": "test", "path": ["a.jsonl"]}]
    readme(tmp_path / "data", [{"config_name": "main", "data_files": splits}])
    assert names_in(path) == ["more/c.jsonl", "more/d.jsonl"]
    assert names_in(path, "test") == ["a.jsonl"]
    with pytest.raises(UserError, match=r"no split 'validation'; it has train, test"):
        names_in(path, "validation")


def test_a_configuration_is_chosen_by_name_or_is_the_default(tmp_path):
    path = folder_of(tmp_path, "en.jsonl", "ja.jsonl", "xx.jsonl")
    configs = [
        {"config_name": "en", "data_files": "en.jsonl"},
        {"config_name": "ja", "data_files": ["ja.jsonl"], "default": True},
    ]
    readme(tmp_path / "data", configs)
    assert names_in(path) == ["ja.jsonl"]
    [row] = load_rows(Source(path=path, config="en")).rows
    assert row == {"name": "en.jsonl"}
    with pytest.raises(UserError, match=r"data\.config: .*has the configurations en, ja"):
        load_rows(Source(path=path, config="fr"))
    del configs[1]["default"]
    readme(tmp_path / "data", configs)
    with pytest.raises(UserError, match=r"data\.config: .*has the configurations en, ja"):
        names_in(path)


@pytest.mark.parametrize("pattern", ["../secret.jsonl", "/etc/*", "https://a/b.jsonl"])
def test_a_readme_names_no_file_outside_its_folder(tmp_path, pattern):
    path = folder_of(tmp_path, "a.jsonl")
    readme(tmp_path / "data", [{"config_name": "default", "data_files": pattern}])
    with pytest.raises(UserError, match="is not in this folder"):
        names_in(path)


def test_a_readme_that_names_no_files_changes_nothing(tmp_path):
    path = folder_of(tmp_path, "a.jsonl")
    for text in ("# No front matter", "---\nlicense: mit\n---\n", "---\n- a\n---\n"):
        write(tmp_path / "data" / "README.md", text)
        assert names_in(path) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"revision": "main"}, r"data\.revision: .* is local: only a Hub data set has revisions"),
        ({"config": "en"}, r"data\.config: .* has no README\.md with configurations"),
    ],
)
def test_what_only_a_hub_data_set_has_is_refused_for_a_local_one(tmp_path, settings, message):
    source = write(tmp_path / "rows.jsonl", LINES).model_copy(update=settings)
    for read in (load_rows, fingerprint):
        with pytest.raises(UserError, match=message):
            read(source)


# The Hub


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported,\nbut found a.py"),
            "supported, but found a.py",
        ),
        (
            DatasetNotFoundError("Dataset 'owner/name' doesn't exist"),
            "Dataset 'owner/name' doesn't exist",
        ),
        (ValueError('Unknown split "dev".'), 'Unknown split "dev".'),
        (OSError(), "OSError"),
        (
            raised_from(DatasetGenerationError("An error occurred"), TypeError("no\ncast")),
            "name: no cast",
        ),
        (
            raised_from(DatasetNotFoundError("not there"), OSError("404 Client Error")),
            "name: not there",
        ),
    ],
)
def test_what_the_hub_s_data_lacks_is_told_in_one_line(monkeypatch, error, reason):
    def load_dataset(*arguments, **settings):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^data\.path: owner/name: .+$") as caught:
        load_rows(Source(path="owner/name"))
    assert str(caught.value).endswith(reason) and "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_is_read_in_order_and_whole(monkeypatch):
    rows = [{"prompt": f"a{number}", "turns": [{"n": number}]} for number in range(2500)]
    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **settings: table)
    loaded = load_rows(Source(path="owner/name"))
    assert loaded.rows == rows
    assert loaded.files == [("owner/name (train)", 2500)]


# Rows as they are asked for


@pytest.mark.parametrize(
    "suffix",
    [".jsonl", ".csv", ".jsonl.gz", ".parquet", ".json", ".json.gz", ".data.json", ".splits.json"],
)
def test_a_file_is_read_no_further_than_is_asked_for(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(json_text, "CHUNK", 2**16)
    rows = [{"prompt": f"{number} " + random.Random(number).randbytes(200).hex()}
            for number in range(5_000)]  # fmt: skip
    content = {
        ".csv": "prompt\n" + "\n".join(row["prompt"] for row in rows),
        ".parquet": parquet(rows),
        ".json": json.dumps(rows),
        ".json.gz": json.dumps(rows, indent=2),
        ".data.json": json.dumps({"version": [1], "data": rows}),
        ".splits.json": json.dumps({"test": rows[:9], "train": rows}),
    }.get(suffix, "\n".join(map(json.dumps, rows)))
    source = write(tmp_path / f"rows{suffix}", content)
    ((_, of_file),) = stream_rows(source)
    tracemalloc.start()
    assert next(of_file) == rows[0]
    assert sum(1 for _ in of_file) == len(rows) - 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) / (2 if suffix == ".parquet" else 5)  # which has 1,024 rows at once


# Places and fingerprints


def test_a_place_names_the_file_and_the_row_in_it_over_several_files(tmp_path):
    write(tmp_path / "data" / "a.jsonl", LINES)
    write(tmp_path / "data" / "b.csv", CSV)
    write(tmp_path / "data" / "c.json", "[]")
    write(tmp_path / "data" / "d.json", '[{"prompt": "x"}]')
    loaded = load_rows(Source(path=str(tmp_path / "data")))
    assert [count for _, count in loaded.files] == [3, 3, 0, 1]
    assert [loaded.place(number).removeprefix(f"{tmp_path}/data/") for number in range(7)] == [
        "a.jsonl: row 0",
        "a.jsonl: row 1",
        "a.jsonl: row 2",
        "b.csv: row 0",
        "b.csv: row 1",
        "b.csv: row 2",
        "d.json: row 0",
    ]
    with pytest.raises(IndexError):
        loaded.place(7)


def test_a_fingerprint_changes_with_any_byte_and_with_nothing_else(tmp_path):
    source = write(tmp_path / "a" / "rows.jsonl", LINES)
    first = fingerprint(source)
    assert fingerprint(source) == first
    assert fingerprint(write(tmp_path / "b" / "rows.jsonl", LINES)) == first
    assert fingerprint(write(tmp_path / "b" / "rows.jsonl.gz", LINES)) == first
    write(tmp_path / "a" / "rows.jsonl", LINES.replace("Tokyo", "Kyoto"))
    assert fingerprint(source) != first


def test_a_fingerprint_of_a_folder_is_of_its_split_s_files_in_their_order(tmp_path):
    source = Source(path=folder_of(tmp_path, "train-0.jsonl", "train-1.jsonl", "test.jsonl"))
    first = fingerprint(source)
    write(tmp_path / "data" / "test.jsonl", "{}")
    assert fingerprint(source) == first
    write(tmp_path / "data" / "train-2.jsonl", "{}")
    assert fingerprint(source) != first
    (tmp_path / "data" / "train-2.jsonl").unlink()
    (tmp_path / "data" / "train-0.jsonl").rename(tmp_path / "data" / "train-3.jsonl")
    assert fingerprint(source) != first


def test_rows_that_move_from_one_file_to_the_next_change_the_fingerprint(tmp_path):
    lines = LINES.splitlines(keepends=True)
    source = Source(path=str(tmp_path / "data"))
    write(tmp_path / "data" / "a.jsonl", lines[0])
    write(tmp_path / "data" / "b.jsonl", "".join(lines[1:]))
    first = fingerprint(source)
    write(tmp_path / "data" / "a.jsonl", "".join(lines[:2]))
    write(tmp_path / "data" / "b.jsonl", lines[2])
    assert fingerprint(source) != first


@pytest.mark.parametrize(
    ("path", "is_local"),
    [
        ("gpt2", False),
        ("owner/name", False),
        ("owner/name.v2", False),
        ("rows.jsonl", True),
        ("data/rows.csv.gz", True),
        ("./data", True),
        ("~/data", True),
        ("/data", True),
        ("a/b/c", True),
    ],
)
def test_a_path_that_does_not_exist_is_told_from_a_name_on_the_hub(path, is_local):
    assert looks_local(path) is is_local


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", LINES)
    assert load_rows(Source(path="~/rows.jsonl")).rows == ROWS


def test_rows_that_unpack_to_far_more_than_their_size_are_refused(tmp_path):
    """1 MB of zeros packed 1000 times is no data set."""
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"a": "' + b" " * 2**24 + b'"}'))
    with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
        load_rows(Source(path=str(file)))
