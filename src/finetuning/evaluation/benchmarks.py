"""Tasks of lm-eval, asked with the prompt that was trained; a killed call is resumed.

<folder>/unfinished_tasks.jsonl   a line that says what is asked of which models, then what each
                                  round of requests gave: {model, results: {request: result}}
<folder>/tasks.jsonl   a question a line: {task, question, filter, target, arguments, responses:
                       {model: ...}, metrics: {metric: {model: value}}}
<folder>/tasks.json    {tasks, models, scores: {task: {metric: {model: {value, low, high}}}},
                       differences: {task: {metric: {model: {mean, low, high}}}}, ...}

A difference is that of a model to the first, or of a model as lm-eval asks it to itself.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import UserError, did_you_mean, one_line
from finetuning.evaluation.asking import Share
from finetuning.evaluation.named_models import Model
from finetuning.evaluation.task_scores import AS_IS, question_lines, summary_of
from finetuning.evaluation.unfinished import Unfinished, require_same
from finetuning.files import write_text
from finetuning.inference.generation import BATCH
from finetuning.inference.page import Column, columns_of
from finetuning.launch.software import installed, versions

PACKAGE = "lm_eval"
UNFINISHED, QUESTIONS, SCORES = "unfinished_tasks.jsonl", "tasks.jsonl", "tasks.json"
SCRIPTS = Path(__file__).parents[2]
SEED = 1234  # lm-eval's own, of the examples that are drawn


@dataclass(frozen=True)
class Benchmarks:
    """Which tasks, and how they are asked."""

    tasks: tuple[str, ...]
    """names of lm-eval, or YAML files"""
    questions: int | None = None
    """of each task, its first ones"""
    num_fewshot: int | None = None
    """examples in front of a question, where the task does not say"""
    fewshot_in_prompt: bool = False
    """in one turn with the question, not as turns of their own"""
    system: str | None = None
    as_is: bool = False
    """ask as lm-eval does too, without the template"""


@contextmanager
def library_named_evaluate() -> Iterator[None]:
    """Within, `import evaluate` is Hugging Face's package, which lm-eval and its tasks import.

    Otherwise it is the script of that name, whose folder Python puts first on the path.
    """
    path, script = sys.path[:], sys.modules.pop("evaluate", None)
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != SCRIPTS]
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules.pop("evaluate", None)
        if script:
            sys.modules["evaluate"] = script


def require_lm_eval() -> None:
    if installed(PACKAGE) is None:
        lock = "--no-deps --require-hashes -r requirements/benchmarks.txt"
        raise UserError(f"--tasks: {PACKAGE} is not installed: pip install {lock}")


def load_tasks(benchmarks: Benchmarks) -> Any:
    """lm-eval's tasks with their data. Raises UserError for one that there is not, whose data
    cannot be had, or that cannot be asked with a prompt.
    """
    from lm_eval.tasks import TaskManager

    files = [name for name in benchmarks.tasks if Path(name).is_file()]
    manager = TaskManager(include_defaults=len(files) < len(benchmarks.tasks))
    for name in benchmarks.tasks:
        if name not in files and name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks)
            raise UserError(f"--tasks: no task {name} in lm-eval, and no such file{hint}")
    try:
        loaded = manager.load(list(benchmarks.tasks))
    except Exception as error:  # a task is a program of others, and loads its data from anywhere
        raise UserError(f"--tasks: {','.join(benchmarks.tasks)}: {one_line(error)}") from error
    for name, task in loaded["tasks"].items():
        require_askable(name, task)
        set_examples(name, task, benchmarks.num_fewshot)
    return loaded


def require_askable(name: str, task: Any) -> None:
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or "acc_mutual_info" in task.aggregation():
        raise UserError(f"--tasks: {name} scores text without a prompt; lm_eval itself does that")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"--tasks: {name} runs programs that the model wrote; that is not done here"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks: {name} asks about pictures or sounds")


def set_examples(name: str, task: Any, number: int | None) -> None:
    """As lm-eval does: 0 where neither the task nor anybody says; a task that says 0 means it."""
    given = task.get_config("num_fewshot")
    if number and given == 0:
        raise UserError(f"--num-fewshot {number}: {name} is asked without examples")
    task.set_config("num_fewshot", (given or 0) if number is None else number)


def ask_tasks(
    models: Sequence[Model], loaded: Any, benchmarks: Benchmarks, folder: Path, share: Share
) -> dict[str, Any]:
    """Fills the folder and returns what tasks.json holds, in every process.

    What was asked before, as it is asked now, is not asked again.
    """
    if benchmarks.as_is and share.processes > 1:
        raise UserError("--as-is: lm-eval would share out the questions its own way; one process")
    head = head_of(models, loaded, benchmarks)
    done = share.of_first(read_scores(folder))
    if done is not None:
        require_same(done.get("asked"), head, folder / SCORES)
        return done
    unfinished = Unfinished(folder / UNFINISHED)
    rounds = share.of_first(unfinished.begin(head) if share.process == 0 else [])
    found = answers_of(models, loaded, benchmarks, share, known_results(rounds), unfinished)
    summary = {**summary_of(found), "asked": head, "versions": software()}
    if share.process == 0:
        lines = [f"{as_json(line)}\n" for line in question_lines(found)]
        write_text(folder / QUESTIONS, "".join(lines))
        write_text(folder / SCORES, f"{as_json(summary, indent=1)}\n")
        unfinished.end()
    return summary


def known_results(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a killed call has left, by model."""
    known: dict[str, dict[str, Any]] = {}
    for line in rounds:
        known.setdefault(line["model"], {}).update(line["results"])
    return known


def head_of(models: Sequence[Model], loaded: Any, benchmarks: Benchmarks) -> dict[str, Any]:
    tasks = {
        name: {"version": str(task.VERSION), "num_fewshot": task.get_config("num_fewshot")}
        for name, task in loaded["tasks"].items()
    }
    asked = [model.record() for model in models]
    head = {"tasks": tasks, "benchmarks": asdict(benchmarks), "models": asked}
    known: dict[str, Any] = json.loads(as_json(head))  # as it is read back
    return known


def read_scores(folder: Path) -> dict[str, Any] | None:
    """What tasks.json holds; None without it."""
    try:
        found: dict[str, Any] = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def software() -> dict[str, str | None]:
    return {**versions(), PACKAGE: installed(PACKAGE)}


def as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)


def answers_of(
    models: Sequence[Model],
    loaded: Any,
    benchmarks: Benchmarks,
    share: Share,
    known: Mapping[str, Mapping[str, Any]],
    unfinished: Unfinished,
) -> dict[str, Any]:
    """What lm-eval says of each model by name; one run in memory at a time."""
    from finetuning.evaluation.recipe_lm import RecipeLM

    found: dict[str, Any] = {}
    for model in models:
        for column in columns_of(model.name, model.folder, model.recipe, model.has_base):
            keep = keeper(unfinished, column.name)
            lm = RecipeLM(column.asker, share, known.get(column.name, {}), keep)
            with column.as_base():
                found[column.name] = evaluated(lm, loaded, benchmarks, has_template=True)
                if benchmarks.as_is:
                    stock = stock_lm(column)
                    as_is = evaluated(stock, loaded, benchmarks, has_template=False)
                    found[f"{column.name}{AS_IS}"] = as_is
        del column, lm
        gc.collect()
    return found


def stock_lm(column: Column) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=column.asker.model, tokenizer=column.asker.tokenizer, batch_size=BATCH)


def evaluated(lm: Any, loaded: Any, benchmarks: Benchmarks, has_template: bool) -> Any:
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(SEED)
    return evaluate(
        lm,
        loaded,
        limit=benchmarks.questions,
        bootstrap_iters=0,  # the intervals are ours, and those of differences too
        system_instruction=benchmarks.system,
        apply_chat_template=has_template,
        fewshot_as_multiturn=has_template and not benchmarks.fewshot_in_prompt,
    )


def keeper(unfinished: Unfinished, model: str) -> Callable[[dict[str, Any]], None]:
    return lambda results: unfinished.add({"model": model, "results": results})
