"""The kinds of data files. A new kind is one function, named in PARSERS."""

from collections.abc import Callable, Iterator
from pathlib import Path

from finetuning.data.json_files import parse_json
from finetuning.data.packed_files import PACKINGS, suffix_of
from finetuning.data.row import Row
from finetuning.data.table_files import parse_arrow, parse_csv, parse_parquet

# Files that `datasets` writes beside the data.
METADATA_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}

# (file, split) -> rows; the split counts where a file has several.
PARSERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": parse_json,
    ".json": parse_json,
    ".csv": parse_csv,
    ".ndjson": parse_json,
    ".tsv": parse_csv,
    ".parquet": parse_parquet,
    ".arrow": parse_arrow,
}
FILE_KINDS = f"{', '.join(PARSERS)}, also with {', '.join(PACKINGS)}"


def is_data(path: Path) -> bool:
    """Whether the file at this path in a folder holds rows.

    Hidden files are copies of others: Jupyter's `.ipynb_checkpoints/`, the `._rows.jsonl` of macOS.
    """
    is_hidden = any(part.startswith(".") for part in path.parts)
    is_about = path.name in METADATA_FILES or path.match("cache-*.arrow")
    return suffix_of(path) in PARSERS and not is_hidden and not is_about
