"""Runs side by side: tables of what was set and what came of it.

Tables are (columns, rows). A number that is known with an interval has three columns: `chrf`,
`chrf low` and `chrf high`.
"""

import math
from statistics import mean, stdev
from typing import Any

from finetuning.errors import UserError, did_you_mean
from finetuning.evaluation.compared_run import FIGURES_OF_PAIRS, Run, common_folder
from finetuning.evaluation.scores import BETTER_IF_HIGHER, SCORES
from finetuning.untrusted_text import printable

NOT_COMPARED = ("training.output_dir",)
DEVIATION = " sd"  # ends the column of a standard deviation
LOW, HIGH = " low", " high"  # end the columns of an interval
STATE = "state"
SEEDS = ("training.seed", "training.data_seed")

HIGHEST_FIRST = (
    *("evaluation accuracy", *FIGURES_OF_PAIRS, "tokens/s", "ended"),
    *BETTER_IF_HIGHER,
)

Rows = tuple[list[str], list[list[Any]]]
"""(columns, rows) of a table"""


def differing(runs: list[Run]) -> list[str]:
    """The settings that are not the same in all runs."""
    every = dict.fromkeys(name for run in runs for name in run.settings if name not in NOT_COMPARED)
    return [
        name
        for name in every
        if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)
    ]


def table_of(runs: list[Run], by: str | None = None) -> Rows:
    """The settings in which runs differ, their figures and their scores; the best first.

    `by` is a column to sort by instead of the evaluation loss. Raises UserError for another name.
    """
    names, scores = differing(runs), scores_of(runs)
    bounds = [f"{name}{end}" for name in scores for end in ("", LOW, HIGH)]
    results = results_of(runs)
    columns = ["run", *names, *results, STATE, *bounds]
    rows = []
    for run in sorted(runs, key=rank):
        settings = [run.settings.get(name) for name in names]
        known = [run.scores.get(name, {}) for name in scores]
        intervals = [score.get(part) for score in known for part in ("mean", "low", "high")]
        name = name_of(run, runs)
        figures = [run.results[column] for column in results]
        rows.append([name, *settings, *figures, run.state, *intervals])
    return columns, rows if by is None else sorted_by(by, columns, rows)


def results_of(runs: list[Run]) -> list[str]:
    """The columns of what came of them; those of pairs where one of the runs has them."""
    is_known = {
        name: any(run.results[name] is not None for run in runs) for name in FIGURES_OF_PAIRS
    }
    return [name for name in runs[0].results if is_known.get(name, True)]


def scores_of(runs: list[Run]) -> list[str]:
    """Those that one of the runs has."""
    return [name for name in SCORES if any(name in run.scores for run in runs)]


def sorted_by(by: str, columns: list[str], rows: list[list[Any]]) -> list[list[Any]]:
    """The best, or else the least, of a column first; runs without a number there last."""
    names = {**{short(name): name for name in columns}, **dict(zip(columns, columns, strict=True))}
    if by not in names:
        hint = did_you_mean(by, names)
        shown = ", ".join(name for name in columns if not name.endswith((LOW, HIGH)))
        raise UserError(f"--by {by}: no such column; there are {shown}{hint}")
    column, sign = columns.index(names[by]), -1 if names[by] in HIGHEST_FIRST else 1

    def place(row: list[Any]) -> tuple[int, Any]:
        value = row[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return 2, 0
        return (0, sign * value) if isinstance(value, int | float) else (1, str(value))

    return sorted(rows, key=place)


def seed_table(runs: list[Run]) -> Rows | None:
    """Mean and standard deviation of runs that differ in nothing but their seed.

    None where there are no two such runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=rank):
        same = {k: v for k, v in run.settings.items() if k not in (*NOT_COMPARED, *SEEDS)}
        groups.setdefault(repr(same), []).append(run)
    seeds = [group for group in groups.values() if len(group) > 1]
    if not seeds:
        return None
    names = [name for name in differing(runs) if name not in SEEDS]
    results = [*results_of(runs), *scores_of(runs)]
    columns = ["seeds", *names, *(f"{name}{end}" for name in results for end in ("", DEVIATION))]
    rows = []
    for group in seeds:
        spreads = [spread([result_of(run, name) for run in group]) for name in results]
        settings = [group[0].settings.get(name) for name in names]
        rows.append([len(group), *settings, *(number for pair in spreads for number in pair)])
    return columns, rows


def result_of(run: Run, name: str) -> float | None:
    return run.scores[name]["mean"] if name in run.scores else run.results.get(name)


def spread(values: list[float | None]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of the values that are known; None of too few."""
    known = [value for value in values if value is not None]
    if not all(map(math.isfinite, known)):
        return math.nan, math.nan
    return mean(known) if known else None, stdev(known) if len(known) > 1 else None


def rank(run: Run) -> list[float]:
    """By loss of the evaluation set, then of training; without one, or where it is NaN, last."""
    losses = [run.last(figure) for figure in ("eval_loss", "loss")]
    return [math.inf if loss is None or math.isnan(loss) else loss for loss in losses]


def name_of(run: Run, runs: list[Run]) -> str:
    """The folder's path below what holds them all."""
    return run.path.absolute().relative_to(common_folder(runs)).as_posix()


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return "-" if value is None else printable(str(value))


def short(setting: str) -> str:
    return setting.removeprefix("training.")
