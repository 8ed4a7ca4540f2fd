"""The run folder: what one run leaves behind, enough to ask, publish or resume it.

recipe.yaml       every setting, as resolved
environment.json  versions, git revision, data, launches
metrics.jsonl     one JSON object per logged step
samples.md        answers before and after, samples.json too
answers.jsonl     answers to the evaluation set, base and trained, with their scores
evaluation.json   the scores' means with intervals
reference.npz     of preference tuning: log-probabilities before the first step
checkpoint-N/     to resume from
model.safetensors or adapter_model.safetensors, tokenizer.json, ...
"""

import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from finetuning.errors import UserError
from finetuning.files import write_text
from finetuning.hub.access import loaded_commit
from finetuning.hub.manifest import NAME
from finetuning.launch.software import git_revision, versions
from finetuning.model.tokenizer import read_tokenizer
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.checkpoints import RECOVER, SEAL, size_damage
from finetuning.untrusted_text import inline, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LOCK = ".lock"

# What a run, or a preview, writes before it has written recipe.yaml and environment.json.
ANSWERS, EVALUATION, REFERENCE = "answers.jsonl", "evaluation.json", "reference.npz"
BEGUN = {
    *(LOCK, "preview", "runs", "wandb", "samples.json", "samples.md", "recipe.yaml"),
    *(ANSWERS, REFERENCE),
}


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


class Sample(NamedTuple):
    """One question that the recipe asks."""

    question: str
    before: str | None
    """None where it was not asked before training, or what it said is lost"""
    after: str | None = None
    """None as long as the run is not finished"""


@dataclass(frozen=True)
class IntervalRecord:
    """A mean, and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationRecord:
    """What evaluation.json has at least; evaluation/results.py writes it."""

    questions: int
    of: int
    names: list[str]
    scores: dict[str, dict[str, IntervalRecord]]
    differences: dict[str, dict[str, IntervalRecord]]


@dataclass(frozen=True)
class RunFolder:
    """A run folder that is only read: each of its files once, when it is first asked for."""

    path: Path

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self.path / "recipe.yaml")

    @cached_property
    def environment(self) -> dict[str, Any]:
        return read_environment(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return read_tokenizer(str(self.path))

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """evaluation.json; None for a run without one, or where it is damaged."""
        try:
            found: dict[str, Any] = json.loads((self.path / EVALUATION).read_text("utf-8"))
            TypeAdapter(EvaluationRecord).validate_python(found)
        except (OSError, ValueError):  # pydantic's error is a ValueError
            return None
        return found

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """The lines of answers.jsonl; nothing without it."""
        return read_lines(self.path / ANSWERS)

    @property
    def is_finished(self) -> bool:
        return bool(self.environment.get("finished"))

    def curve(self, figure: str) -> tuple[list[int], list[float]]:
        """(steps, values) wherever the figure was logged."""
        known = [line for line in self.metrics if line.get(figure) is not None]
        points = {line["step"]: line[figure] for line in known}
        return list(points), list(points.values())

    def last(self, figure: str) -> float | None:
        """The figure's last value, None where it was never logged."""
        return next(iter(self.curve(figure)[1][::-1]), None)


def require_free_or_ours(folder: Path) -> None:
    """Raises UserError where the folder holds what no run has written, or a link.

    A run writes files of many names, config.json and README.md among them: `.`, `~/.docker` or a
    repository as training.output_dir would lose theirs. What a run has written is told by its
    recipe.yaml and environment.json, or by there being nothing else yet.
    """
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    except (OSError, ValueError) as error:  # no file system has such a name, or it is hidden
        raise UserError(f"training.output_dir: {folder} cannot be used: {error}") from None
    if links := [path.name for path in found if path.is_symlink()]:
        raise UserError(
            f"training.output_dir: {folder} holds a link, {links[0]}, through which files "
            "elsewhere would be written; delete it, or choose another folder"
        )
    names = {path.name for path in found}
    if "recipe.yaml" in names and names & {"environment.json", SEAL}:
        return
    if foreign := sorted(name for name in names - BEGUN if not name.endswith(".tmp")):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"training.output_dir: {folder} is not a run folder: it holds {foreign[0]}{more}, "
            "which could be overwritten; choose a folder that is empty or new"
        )


def require_local_output(file: Path, recipe: Recipe, overrides: Sequence[str]) -> None:
    """Raises UserError where a pulled recipe chooses a folder outside the current one.

    A recipe with a manifest beside it is somebody else's; where files are written is for the person
    to say, as an override.
    """
    if not file.with_name(NAME).is_file():
        return
    if any(override.startswith(("training.output_dir=", "training=")) for override in overrides):
        return
    path = Path(recipe.training.output_dir)
    if path.is_absolute() or any(part.startswith(("~", ".")) for part in path.parts):
        raise UserError(
            f"training.output_dir: {path} is chosen by a recipe that was pulled, and is not a "
            "folder below the current one; say where to write: training.output_dir=outputs/again"
        )


def lock(folder: Path) -> AbstractContextManager[Any]:
    """Held from now to the end of the context, or of the process, however it ends.

    Raises UserError where another process holds it.
    """
    with suppress(PermissionError):  # a lock that others may open is one that they may hold
        (folder / LOCK).touch(mode=0o600)
        (folder / LOCK).chmod(0o600)
    try:
        return FileLock(folder / LOCK, mode=0o600).acquire(blocking=False)
    except Timeout:
        launches = read_environment(folder).get("launches") or [{}]
        who = (
            f" (process {launches[-1]['process']} on {launches[-1]['host']})"
            if "process" in launches[-1]
            else ""
        )
        raise UserError(
            f"{folder} is in use: another run writes to it{who}; wait for its end, or choose "
            "another folder with training.output_dir=..."
        ) from None


def output_folder(recipe: Recipe) -> Path:
    """Where the recipe's run is, or will be. Raises UserError for the home of nobody, `~x`."""
    try:
        return Path(recipe.training.output_dir).expanduser()
    except RuntimeError as error:
        raise UserError(f"training.output_dir: {recipe.training.output_dir}: {error}") from None


def make_folder(folder: Path) -> Path:
    """The folder, which exists and can be written. Raises UserError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise UserError(
            f"training.output_dir: {folder} cannot be written: {getattr(error, 'strerror', error)}"
        ) from None
    return folder


def write_start(folder: Path, recipe: Recipe, fingerprint: str, launch: dict[str, Any]) -> None:
    """recipe.yaml and environment.json, before the first step: a run that dies explains itself too.

    A resumed run keeps what was written first and adds its own launch.
    """
    first: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": git_revision(),
        "data": fingerprint,
        "base_commit": loaded_commit(recipe.model.name, recipe.model.revision)
        if recipe.model.name
        else None,
        "finished": None,
        "launches": [],
    }
    environment = {**first, **(known_environment(folder) or {}), "finished": None}
    launches = [*environment["launches"], {"started": now(), "arguments": sys.argv, **launch}]
    write_text(folder / "recipe.yaml", recipe.as_yaml())
    write_environment(folder, {**environment, "launches": launches})


def write_finish(folder: Path, kept_step: int) -> None:
    """`kept_step`: whose weights the run folder has, the last step's or the best's."""
    finish = {"finished": now(), "kept_step": kept_step}
    write_environment(folder, {**read_environment(folder), **finish})


@contextmanager
def noting_end(folder: Path, is_first: bool) -> Iterator[None]:
    """Notes when the launch ended, however it does but by a kill; the first process does it.

    One that ends before it is written down leaves those before it as they were.
    """
    before = len((known_environment(folder) or {}).get("launches", []))
    try:
        yield
    finally:
        environment = known_environment(folder) if is_first else None
        if environment and len(environment.get("launches", [])) > before:
            environment["launches"][-1]["ended"] = now()
            with suppress(OSError):  # a full disk must not hide why it ended
                write_environment(folder, environment)


def write_environment(folder: Path, environment: dict[str, Any]) -> None:
    write_text(
        folder / "environment.json", json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
    )


def read_environment(folder: Path) -> dict[str, Any]:
    """What environment.json holds, nothing without one. Raises UserError if it is damaged."""
    environment = known_environment(folder)
    if environment is None:
        raise UserError(
            f"{folder / 'environment.json'} is damaged; the command that began the run writes it "
            "anew, and needs a checkpoint or a moment for it"
        )
    return environment


def known_environment(folder: Path) -> dict[str, Any] | None:
    """As read_environment, but None if it is damaged."""
    file = folder / "environment.json"
    try:
        environment = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, IsADirectoryError):
        return None
    launches = environment.get("launches", []) if isinstance(environment, dict) else None
    is_whole = isinstance(launches, list) and all(isinstance(each, dict) for each in launches)
    return environment if is_whole else None


def append_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line_of(metrics) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds; a line that a killed run left unfinished is passed over."""
    return [entry for entry in read_lines(folder / "metrics.jsonl") if "step" in entry]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON object of each line; one that a killed run left unfinished is passed over."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    entries = []
    for line in text.split("\n"):
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    write_text(folder / "metrics.jsonl", "".join(line_of(metrics) + "\n" for metrics in history))


def line_of(metrics: dict[str, Any]) -> str:
    """One line of JSON, which knows neither NaN nor infinity: they are null."""
    numbers = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(numbers, allow_nan=False)


def write_samples(folder: Path, samples: list[Sample]) -> None:
    """samples.json, and samples.md to read."""
    write_text(
        folder / "samples.json",
        json.dumps([s._asdict() for s in samples], indent=1, ensure_ascii=False) + "\n",
    )
    parts = ["# Answers before and after training\n", *sample_parts(samples)]
    write_text(folder / "samples.md", "\n".join(parts))


def sample_parts(samples: list[Sample]) -> list[str]:
    """Markdown of each sample: its question as a heading, the answers as code."""
    parts = []
    for question, before, after in samples:
        first = "(not asked)" if before is None else before
        last = "(not yet)" if after is None else after
        answers = f"Before:\n\n{quoted(first)}\n\nAfter:\n\n{quoted(last)}\n"
        parts.append(f"## {inline(question)}\n\n{answers}")
    return parts


def read_samples(folder: Path) -> list[Sample]:
    """What samples.json holds. Raises UserError if it is damaged."""
    samples = known_samples(folder)
    if samples is None:
        raise UserError(
            f"{folder / 'samples.json'} is damaged; src/generate.py asks the model anew"
        )
    return samples


def known_samples(folder: Path) -> list[Sample] | None:
    """As read_samples, but None if it is damaged."""
    file = folder / "samples.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        return [Sample(**entry) for entry in entries]
    except (ValueError, TypeError, IsADirectoryError):
        return None


def quoted(text: str) -> str:
    """The text as a code block of Markdown, without control characters."""
    return "\n".join(f"    {printable(line)}" for line in text.splitlines() or [""])


def find_run_folder(name: str) -> Path:
    """The run folder that was named, itself or by its recipe.

    Raises UserError where no trained model is in it.
    """
    path = Path(name).expanduser()
    recipe = path / "recipe.yaml" if means_folder(name) else path
    if recipe != path and not recipe.exists():
        raise UserError(f"{path} is not a run folder: it has no recipe.yaml")
    folder = path if recipe != path else output_folder(load_recipe(path))
    if damage := size_damage(folder):
        raise UserError(f"{folder}: {damage}; {RECOVER}")
    if not has_model(folder):
        script = load_recipe(recipe).script
        raise UserError(
            f"{folder} has no trained model; train it: accelerate launch {script} {recipe}"
        )
    return folder


def means_folder(name: str) -> bool:
    """Whether a run folder is named, not a recipe. Raises UserError where there is neither."""
    path = Path(name).expanduser()
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: no such run folder or recipe")
    return path.is_dir()


def has_model(folder: Path) -> bool:
    return any((folder / weights).exists() for weights in WEIGHTS)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
