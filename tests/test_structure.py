"""src/ keeps to the rules of CONTRIBUTING.md: imports go one way, docstrings are manuals.

Imports are read from the source, wherever they stand: inside a function or below TYPE_CHECKING they
tie modules together just as well.
"""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
SCRIPTS = sorted(path.stem for path in SOURCE.glob("*.py"))
PACKAGE = SOURCE / "finetuning"
# Each imports itself and what stands before it; publishing and training do not know each other.
ORDER = [
    ["untrusted_text"],
    ["errors", "files", "html_page", "secrets", "section"],
    ["data", "hub"],
    ["recipe"],
    ["launch"],
    ["model"],
    ["budget"],
    ["runs"],
    ["inference"],
    ["export"],
    ["evaluation"],
    ["training", "publishing"],
]
# How a script starts and ends, and what two of them do: for scripts only.
BESIDE = ["script", "command_line", "training_script"]
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)


def imported_names(path: Path, root: Path = SOURCE) -> set[str]:
    """Full dotted names of everything a file below root imports, at any depth."""
    names = set()
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*above, *filter(None, [node.module])])
            names |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return names


def file_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def imports_between_modules() -> dict[str, set[str]]:
    """{module of finetuning: modules of finetuning that it imports}."""
    graph = {}
    for module in MODULES:
        names = imported_names(file_of(module))
        graph[module] = {other for other in MODULES if f"finetuning.{other}" in names}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in graph)), [])


def test_the_walk_finds_a_ring_and_only_a_ring():
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"a"}}) == ["a", "a"]


EVERY_KIND = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from finetuning.a import A
def function():
    import finetuning.b
    from finetuning import c
    from . import d
    from .e import E
"""


def test_imports_are_found_at_any_depth(tmp_path):
    file = tmp_path / "finetuning" / "module.py"
    file.parent.mkdir()
    file.write_text(EVERY_KIND)
    assert {f"finetuning.{name}" for name in "abcde"} <= imported_names(file, tmp_path)


def test_imports_in_the_package_go_one_way():
    graph = imports_between_modules()
    assert sum(map(len, graph.values())) > len(MODULES), "hardly any import was found"
    assert cycle(graph) == []


def test_packages_import_only_what_stands_before_them():
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} == {*level, *BESIDE}
    wrong = []
    for module, others in imports_between_modules().items():
        room = module.partition(".")[0]
        for other in (other.partition(".")[0] for other in others):
            if (
                room not in BESIDE
                and other != room
                and not level.get(other, len(ORDER)) < level[room]
            ):
                wrong.append(f"{module} imports {other}")
    assert not wrong


# What a person searches for: the beginning of the word as it stands in a path.
SEARCHED = {
    "mask": "mask",
    "collator": "collat",
    "sampler": "sampler",
    "packing": "packing",
    "resume": "resum",
    "checkpoint": "checkpoint",
    "LoRA": "lora",
    "precision": "precision",
    "tokenizer": "tokenizer",
    "chat template": "chat_template",
    "generate": "generat",
    "eval": "eval",
    "download": "download",
    "upload": "upload",
    "publish": "publish",
    "distributed": "distributed",
    "launch": "launch",
    "OOM/memory check": "memory",
    "signal": "signal",
    "stop": "stop",
    "merge": "merg",
    "FLOPs": "flops",
    "throughput": "throughput",
    "attention": "attention",
    "loss": "loss",
    "quantization": "quantiz",
    "reader": "reader",
    "template": "template",
    "cache": "cache",
    "manifest": "manifest",
    "model card": "card",
    "recipe": "recipe",
    "schema": "schema",
    "device": "device",
    "strategy": "strateg",
    "callbacks": "callback",
    "logger": "logger",
    "plot": "plot",
    "compare": "compar",
    "retry": "retr",
}


def test_what_people_search_for_is_found_in_paths():
    """Prints the table: pytest -s -k search."""
    paths = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    found = {
        word: [path for path in paths if re.search(rf"(^|[/_]){stem}", path)]
        for word, stem in SEARCHED.items()
    }
    for word, files in found.items():
        print(f"{word:18}{' '.join(files[:3]) or '-'}")
    assert len(SEARCHED) == 40
    assert sum(map(bool, found.values())) >= 30


@pytest.mark.parametrize(
    "room", [name for names in ORDER for name in names if (PACKAGE / name).is_dir()]
)
def test_a_room_says_what_it_is_for_and_which_file_to_read_first(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8")))
    (first,) = re.findall(r"^Read `(\w+\.py)` first", text, re.MULTILINE)
    assert (PACKAGE / room / first).is_file()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_script(module):
    names = imported_names(file_of(module))
    assert not {name.partition(".")[0] for name in names} & {*SCRIPTS, "src"}


def test_nothing_directly_in_src_is_named_like_a_library():
    installed = importlib.metadata.packages_distributions()
    for path in SOURCE.iterdir():
        if path.suffix == ".py" or (
            path.is_dir() and not path.name.startswith(("_", ".")) and path.suffix == ""
        ):
            assert path.stem not in sys.stdlib_module_names, f"{path.name} hides a standard module"
            others = set(installed.get(path.stem, [])) - {"finetuning-recipes"}
            assert not others, f"{path.name} hides {path.stem} of {', '.join(others)}"


def test_there_is_no_drawer_for_everything():
    drawers = {"util", "utils", "common", "helper", "helpers", "misc"}
    assert not [path for path in SOURCE.rglob("*") if path.stem.strip("_") in drawers]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_docstring(script, flag, run_script):
    manual = ast.get_docstring(ast.parse((SOURCE / f"{script}.py").read_text(encoding="utf-8")))
    answer = run_script(f"{script}.py", flag)
    assert f"src/{script}.py" in manual
    assert (answer.stdout + answer.stderr).strip() == manual.strip()


def test_test_modules_do_not_import_each_other():
    """What several of them need is a fixture of conftest or a support module beside it."""
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        names = {name.partition(".")[0] for name in imported_names(path, tests)}
        assert not [name for name in names if name.startswith("test_")], path
