"""The `configs` of a data set's README.md, in a local copy of it, as `datasets` reads them."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from finetuning.errors import UserError, one_line

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def configured_files(path: Path, config: str | None, split: str) -> list[Path] | None:
    """The files of a split as README.md has it; None where it says nothing of files.

    Raises UserError for a configuration or split that it does not have.
    """
    readme = path / "README.md"
    configs = configs_of(readme) if readme.is_file() else {}
    if not configs:
        if config is not None:
            raise UserError(f"data.config: {path} has no README.md with configurations")
        return None
    chosen = chosen_config(configs, config, readme)
    splits = chosen["splits"]
    if split not in splits:
        raise UserError(f"data.split: {readme} has no split {split!r}; it has {', '.join(splits)}")
    files = [file for pattern in splits[split] for file in matching(path, pattern, readme)]
    if not files:
        raise UserError(f"data.path: {path}: no file matches {', '.join(splits[split])}")
    return list(dict.fromkeys(files))


def chosen_config(configs: dict[str, Any], name: str | None, readme: Path) -> dict[str, Any]:
    if name is None:
        marked = [key for key, value in configs.items() if value["is_default"]]
        name = [*marked, "default"][0] if len(configs) > 1 else next(iter(configs))
    if name not in configs:
        raise UserError(f"data.config: {readme} has the configurations {', '.join(configs)}")
    chosen: dict[str, Any] = configs[name]
    return chosen


def configs_of(readme: Path) -> dict[str, Any]:
    """{name: {is_default, splits: {split: patterns}}} of the configurations that name files."""
    found = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    entries = front_matter(found[1], readme).get("configs") if found else None
    configs = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and "data_files" in entry:
            folder = str(entry.get("data_dir") or "")
            configs[str(entry.get("config_name", "default"))] = {
                "is_default": entry.get("default") is True,
                "splits": splits_of(entry["data_files"], folder),
            }
    return configs


def front_matter(text: str, readme: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise UserError(f"{readme}: is not YAML: {one_line(error)}") from None
    return values if isinstance(values, dict) else {}


def splits_of(data_files: Any, folder: str) -> dict[str, list[str]]:
    """The patterns of each split; a list of files, or one, is train."""
    if isinstance(data_files, dict):
        pairs = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(each, dict) for each in data_files):
        pairs = [(each.get("split", "train"), each.get("path", [])) for each in data_files]
    else:
        pairs = [("train", data_files)]
    splits: dict[str, list[str]] = {}
    for split, patterns in pairs:
        each = patterns if isinstance(patterns, list) else [patterns]
        splits.setdefault(str(split), []).extend(
            str(PurePosixPath(folder, str(pattern))) for pattern in each
        )
    return splits


def matching(path: Path, pattern: str, readme: Path) -> list[Path]:
    """The files in the folder that a pattern names. Raises UserError for one that leads out."""
    parts = PurePosixPath(pattern)
    if parts.is_absolute() or ".." in parts.parts or re.match(r"\w+:/", pattern):
        raise UserError(f"{readme}: data_files {pattern!r} is not in this folder")
    return sorted(file for file in path.glob(pattern) if file.is_file())
