"""Which examples are trained and which are evaluated on, and how often each is used."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuning.data.examples import Counts
from finetuning.data.groups import first_of_group
from finetuning.data.section import SAME_TEXT, Data, Eval, Source
from finetuning.data.storage import Arrays
from finetuning.data.tally import SHOWN_PLACES, Tally
from finetuning.errors import UserError

SHARED = ("row_keys", "prompts", "responses")  # keys of rows that stay on one side of the split


class Sides(NamedTuple):
    """Numbers of examples."""

    kept: Counts
    train: Counts
    """with repeats, as data.path[].weight says"""
    held_out: Counts
    leaked: int
    """evaluation examples whose prompt or response is trained"""
    is_grouped: bool
    """whether a group has more than one example"""


def draw_sides(arrays: Arrays, data: Data, tally: Tally) -> Sides:
    """Raises UserError where no row has the column that data.eval.group_by names."""
    group_by = data.eval.group_by if data.eval else None
    if group_by and group_by != SAME_TEXT:
        tally.unused.discard(group_by)
        if len(arrays["prompts"]) and not arrays["prompts"].any():
            raise UserError(f"data.eval.group_by: no row has a column {group_by}")
    kept = without_duplicates(arrays, data, tally)
    same = first_of_group(arrays[name][kept] for name in SHARED)
    groups = same if group_by else first_of_group([arrays["row_keys"][kept]])
    is_eval = evaluation_set(arrays["is_eval"][kept], groups, data.eval)
    copies = copies_by_weight(arrays["sources"][kept], data.sources)
    return Sides(
        kept=kept,
        train=np.repeat(kept, copies * ~is_eval),
        held_out=kept[is_eval],
        leaked=int(np.isin(same[is_eval], same[~is_eval]).sum()),
        is_grouped=len(np.unique(groups)) < len(groups),
    )


def without_duplicates(arrays: Arrays, data: Data, tally: Tally) -> NDArray[np.int64]:
    """(kept,) numbers of the examples, without copies of earlier ones where the recipe says so."""
    first = first_of_group([arrays["copies"]])
    numbers = np.arange(len(first))
    copies = np.flatnonzero(first != numbers)
    tally.counts["duplicates"] = len(copies)
    if data.duplicates != "drop":
        return numbers
    rows = arrays["rows"]
    for number in copies[:SHOWN_PLACES].tolist():
        tally.drop("duplicate", f"row {rows[number]} of all is row {rows[first[number]]} once more")
    tally.dropped["duplicate"] += max(0, len(copies) - SHOWN_PLACES)
    return np.delete(numbers, copies)


def evaluation_set(
    is_eval: NDArray[np.bool_], groups: NDArray[np.int64], split: Eval | None
) -> NDArray[np.bool_]:
    """(kept,) which of the kept rows are evaluated on. The same on every machine and run.

    is_eval: (kept,) whether a row is of the split that is named for it. groups: (kept,) of
    first_of_group: a group goes where its first row is drawn to.
    """
    if split is None or len(is_eval) == 0:
        return np.zeros(len(is_eval), bool)
    if split.split:
        return is_eval
    numbers = np.arange(len(is_eval))
    if split.every:
        drawn = numbers % split.every == 0
    else:
        assert split.fraction is not None
        count = max(1, round(len(is_eval) * split.fraction))
        order = np.random.default_rng(split.seed or 0).permutation(len(is_eval))
        drawn = np.isin(numbers, order[:count])
    of_group: NDArray[np.bool_] = drawn[groups]
    # One group at least, as one row at least is drawn.
    return of_group if of_group.any() else groups == groups[drawn.argmax()]


def copies_by_weight(source_of: NDArray[np.int32], sources: list[Source]) -> NDArray[np.int64]:
    """(kept,) how often each row is used; the fractional part of a weight is a seeded draw."""
    weights = np.array([source.weight for source in sources])[source_of]
    draw = np.random.default_rng(0).random(len(weights))
    copies: NDArray[np.int64] = np.floor(weights).astype(np.int64) + (draw < weights % 1)
    return copies
