"""Recipe and tokenizer -> training and evaluation examples, every row accounted for.

load -> where -> read -> render -> tokenize -> overflow -> duplicates -> eval split -> weight

Rows are read and worked on in blocks, by as many processes as there are cores, and what becomes of
them is on disk at once: memory does not grow with the number of rows.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.data.evaluation_split import Sides, draw_sides
from finetuning.data.loading import blocks_of_rows
from finetuning.data.preparation import Preparation, refuse
from finetuning.data.rendering import read_row, render_row
from finetuning.data.row import BadRow
from finetuning.data.section import Data
from finetuning.data.storage import Arrays, GrowingArrays, seal, write_examples
from finetuning.data.tally import Tally, make_report
from finetuning.data.templates import TEMPLATES, MarkerTemplate
from finetuning.data.workers import cores, map_in_order
from finetuning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build(data: Data, tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Writes the examples of the recipe's data section, for read_prepared, into an empty folder.

    Raises UserError where rows do not fit or nothing is left to train or evaluate on.
    """
    preparation, tally = Preparation(data, tokenizer), Tally()
    arrays = prepare_rows(preparation, folder, tally)
    sides = draw_sides(arrays, data, tally)
    report = make_report(tally, arrays, sides.kept, len(sides.train), len(sides.held_out))
    report["leaked"] = sides.leaked
    report["added_end_mark"] = preparation.template.added_end_mark
    require_examples(data, sides, report)

    digest = hashlib.sha256()
    write_examples(folder, "train", arrays, sides.train, digest)
    if data.eval:
        write_examples(folder, "eval", arrays, sides.held_out, digest)
    seal(folder, report, digest.hexdigest())


def prepare_rows(preparation: Preparation, folder: Path, tally: Tally) -> Arrays:
    """What is kept of every example, mapped from disk."""
    kept = GrowingArrays(folder)
    # Makes here what every process needs, before they are forked from this one.
    kept.append(preparation([]).arrays)
    blocks = blocks_of_rows(preparation.data, tally)
    for block in map_in_order(preparation, blocks, preparation.data.num_proc or cores()):
        kept.append(block.arrays)
        tally.add(block.tally)
    return kept.mapped()


def require_examples(data: Data, sides: Sides, report: dict[str, Any]) -> None:
    """Raises UserError where nothing is left to train on, or to evaluate on."""
    if len(sides.train) and (len(sides.held_out) or not data.eval):
        return
    which = "evaluate" if len(sides.train) else "train"
    counts = f"{json.dumps(report['rows'])}, dropped {json.dumps(report['dropped'])}"
    hint = "; data.eval.group_by: null draws each row alone" if sides.is_grouped else ""
    raise UserError(f"nothing to {which} on: {counts}{hint}")


def training_texts(data: Data) -> Iterator[str]:
    """Every text of the rows with the markers around it, to train a tokenizer on.

    The rows of eval.split are left out. Those of eval.every and eval.fraction are not: these count
    rows that fit max_length, which only a tokenizer can tell. Raises UserError where a row does not
    fit the template, unless such rows are dropped.
    """
    template = MarkerTemplate(TEMPLATES[data.template], eos="", newline=data.newline)
    sources = data.sources
    for row in chain.from_iterable(blocks_of_rows(data, Tally())):
        try:
            conversation = read_row(row.columns, sources[row.source])
            examples = render_row(conversation, template, data.loss_on, data.turns)
        except BadRow as error:
            refuse(row.place, error, data, Tally())
            continue
        if not row.is_eval:
            for segments in examples:
                yield from (segment.text for segment in segments if not segment.is_special)
