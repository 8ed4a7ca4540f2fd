"""Recipe and tokenizer -> training and evaluation examples, every row accounted for.

load -> where -> read -> render -> tokenize -> overflow -> eval split -> weight
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.rendering import Conversation, read_row, render_row
from finetuning.data.row import BadRow, Row
from finetuning.data.section import Data, Eval, Source
from finetuning.data.sources import Rows, load_rows
from finetuning.data.templates import CHAT, TEMPLATES, MarkerTemplate, Segment, Template
from finetuning.data.tokenization import IGNORE_INDEX, Examples, exceptions, tokenize, train_on_all
from finetuning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN_PLACES = 5  # dropped rows of a reason that the report names


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on."""

    train: Examples
    eval: Examples | None
    report: dict[str, Any]
    """rows: {loaded, where, kept, train, eval}; dropped: {reason: rows}; cut: rows; of the kept
    rows tokens: {prompt, response, total, max} and end_mark_share (0..1); places: of the first few
    dropped rows of each reason; added_end_mark: of Template; spelled, merged: rows of Exceptions"""
    fingerprint: str
    """digest of the examples: changes with any token, label or row number"""


class ReadRow(NamedTuple):
    """A row that was read."""

    row: int
    source: int
    is_eval: bool
    conversation: Conversation
    place: str


class Tally:
    """Counts what becomes of the rows; `refuse` raises or drops, as data.invalid_rows says."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.loaded = self.where = self.cut = 0
        self.dropped: Counter[str] = Counter()
        self.places: list[str] = []

    def refuse(self, place: str, error: BadRow) -> None:
        if self.data.invalid_rows == "error":
            hint = "data.invalid_rows: drop leaves such rows out and counts them"
            raise UserError(f"{place}: {error} ({hint})")
        self.drop("invalid", f"{place}: {error}")

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] <= SHOWN_PLACES:
            self.places.append(f"{reason}: {place}")


def build(data: Data, tokenizer: "PreTrainedTokenizerFast") -> Prepared:
    """The examples of the recipe's data section.

    Raises UserError where rows do not fit or nothing is left to train or evaluate on.
    """
    tally = Tally(data)
    template = load_template(data, tokenizer)
    read, segments = render_all(data, template, tally)
    responses = tokenize(segments, tokenizer)
    whole = responses if data.loss_on == "response" else train_on_all(responses)
    kept = fit(whole, read, tally)
    is_closed = ends_with_mark(responses.select(kept, data.max_length), template, tokenizer)
    kept_rows = [read[number] for number in kept]
    is_eval = evaluation_set(kept_rows, data.eval)
    copies = copies_by_weight(kept_rows, data.sources)

    rows = np.array([each.row for each in kept_rows], np.int64)
    examples = replace(whole.select(kept, data.max_length), rows=rows)
    train = examples.select(np.repeat(np.arange(len(kept)), copies * ~is_eval))
    held_out = examples.select(np.flatnonzero(is_eval)) if data.eval else None
    other = exceptions([segments[number] for number in kept], tokenizer)
    report = {
        **make_report(tally, examples, is_closed, train, held_out),
        "added_end_mark": template.added_end_mark,
        "spelled": int(other.spelled.sum()),
        "merged": int(other.merged.sum()),
    }
    if len(train) == 0 or (held_out is not None and len(held_out) == 0):
        which = "train" if len(train) == 0 else "evaluate"
        counts = f"{json.dumps(report['rows'])}, dropped {json.dumps(report['dropped'])}"
        raise UserError(f"nothing to {which} on: {counts}")
    return Prepared(train, held_out, report, digest_of(train, held_out))


def load_template(data: Data, tokenizer: "PreTrainedTokenizerFast") -> Template:
    """The recipe's template with the tokenizer's own special tokens.

    Raises UserError if the tokenizer lacks what the template needs.
    """
    if data.template == CHAT:
        if not tokenizer.chat_template:
            raise UserError(
                "data.template: chat, but the tokenizer has no chat template; "
                f"allowed are {', '.join(TEMPLATES)}"
            )
        template = ChatTemplate(tokenizer)
        if not template.end_marks:
            raise UserError(
                "data.template: chat: the tokenizer's chat template ends no response, and the "
                "tokenizer has no EOS token to end it with; use another template"
            )
        return template
    if tokenizer.eos_token is None:
        raise UserError(
            f"data.template: {data.template} ends a response with EOS, the tokenizer has none"
        )
    bos = tokenizer.bos_token if prepends_bos(tokenizer) else None
    return MarkerTemplate(TEMPLATES[data.template], tokenizer.eos_token, bos, data.newline)


def prepends_bos(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Prepend BOS only if the tokenizer does, as in pre-training (Llama, Gemma: yes; GPT-2: no)."""
    has_bos = tokenizer.bos_token is not None
    return has_bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def training_texts(data: Data) -> Iterator[str]:
    """Every text of the rows with the markers around it, to train a tokenizer on.

    The rows of eval.split are left out. Those of eval.every and eval.fraction are not: these count
    rows that fit max_length, which only a tokenizer can tell. Raises UserError where a row does not
    fit the template, unless such rows are dropped.
    """
    template = MarkerTemplate(TEMPLATES[data.template], eos="", newline=data.newline)
    for read, segments in zip(*render_all(data, template, Tally(data)), strict=True):
        if not read.is_eval:
            yield from (segment.text for segment in segments if not segment.is_special)


def render_all(
    data: Data, template: Template, tally: Tally
) -> tuple[list[ReadRow], list[list[Segment]]]:
    """The segments of every example, and the row that each was made of."""
    rows, segments = [], []
    read = read_rows(data, tally)
    for each in tqdm(read, desc="rendering", disable=None, leave=False, delay=1):
        try:
            examples = render_row(each.conversation, template, data)
        except BadRow as error:
            tally.refuse(each.place, error)
            continue
        segments += examples
        rows += [each] * len(examples)
    return rows, segments


def read_rows(data: Data, tally: Tally) -> Iterator[ReadRow]:
    """Every row that `where` keeps, read into messages. Rows are numbered in order of loading."""
    for number, source in enumerate(data.sources):
        yield from read_split(source, number, False, tally)
        if data.eval and data.eval.split:
            other = source.model_copy(update={"split": data.eval.split})
            yield from read_split(other, number, True, tally)


def read_split(source: Source, number: int, is_eval: bool, tally: Tally) -> Iterator[ReadRow]:
    loaded = load_rows(source)
    check_columns(source.where, loaded)
    for index, row in enumerate(loaded.rows):
        if matches(row, source.where):
            tally.where += 1
            place = loaded.place(index)
            try:
                conversation = read_row(row, source)
            except BadRow as error:
                tally.refuse(place, error)
                continue
            yield ReadRow(tally.loaded + index, number, is_eval, conversation, place)
    tally.loaded += len(loaded.rows)


def matches(row: Row, where: dict[str, Any]) -> bool:
    return all(row.get(column) == value for column, value in where.items())


def check_columns(where: dict[str, Any], loaded: Rows) -> None:
    for column in where:
        if not any(column in row for row in loaded.rows):
            columns = list(loaded.rows[0])
            name, _ = loaded.files[0]
            found = f"it has {', '.join(columns)}{did_you_mean(column, columns)}"
            raise UserError(f"data.where: {name} has no column {column}, {found}")


def fit(whole: Examples, read: list[ReadRow], tally: Tally) -> NDArray[np.int64]:
    """(kept,) numbers of the examples that fit max_length and have a token left to train.

    With data.overflow: cut all fit, of which only the first tokens count.
    """
    limit = tally.data.max_length
    is_long = whole.lengths > limit
    check_overflow(whole, np.flatnonzero(is_long), read, tally)
    is_dropped = is_long & (tally.data.overflow == "drop")

    has_response = last_trained(whole, limit) >= 0
    for number in np.flatnonzero(~has_response & ~is_dropped):
        tally.drop("no_response", read[number].place)
    kept = np.flatnonzero(has_response & ~is_dropped)
    tally.cut = int(is_long[kept].sum())
    return kept


def check_overflow(
    whole: Examples, too_long: NDArray[np.int64], read: list[ReadRow], tally: Tally
) -> None:
    limit, overflow = tally.data.max_length, tally.data.overflow
    for number in too_long:
        found = f"{whole.lengths[number]} tokens, data.max_length is {limit}"
        problem = f"{read[number].place}: {found}"
        if overflow == "error":
            raise UserError(f"{problem} (data.overflow: drop or cut)")
        if overflow == "drop":
            tally.drop("overflow", problem)


def last_trained(whole: Examples, limit: int) -> NDArray[np.int64]:
    """(examples,) place in the flat arrays of the last trained token; -1 without one.

    Of each example only the first `limit` tokens count.
    """
    is_trained = whole.labels != IGNORE_INDEX
    places = np.where(is_trained, np.arange(len(is_trained)), -1)
    latest = np.append(np.maximum.accumulate(places), -1)  # up to and including each token
    starts = whole.ends - whole.lengths
    last = latest[starts + np.minimum(whole.lengths, limit) - 1]
    return np.where((last >= starts) & (whole.lengths > 0), last, -1)


def ends_with_mark(
    kept: Examples, template: Template, tokenizer: "PreTrainedTokenizerFast"
) -> NDArray[np.bool_]:
    """(kept,) whether the last token of an example's responses is an end mark."""
    last = last_trained(kept, kept.lengths.max(initial=1))
    tokens = np.append(kept.input_ids, -1)[last]  # -1 without a response
    return np.isin(tokens, tokenizer.convert_tokens_to_ids(template.end_marks)) & (last >= 0)


def evaluation_set(kept: list[ReadRow], split: Eval | None) -> NDArray[np.bool_]:
    """(kept,) which of the kept rows are evaluated on. The same on every machine and run."""
    numbers = np.arange(len(kept))
    if split is None:
        return np.zeros(len(kept), bool)
    if split.every:
        is_eval: NDArray[np.bool_] = numbers % split.every == 0
        return is_eval
    if split.fraction:
        count = max(1, round(len(kept) * split.fraction))
        drawn = np.random.default_rng(split.seed or 0).permutation(len(kept))[:count]
        return np.isin(numbers, drawn)
    return np.array([each.is_eval for each in kept], bool)


def copies_by_weight(kept: list[ReadRow], sources: list[Source]) -> NDArray[np.int64]:
    """(kept,) how often each row is used; the fractional part of a weight is a seeded draw."""
    weights = np.array([sources[each.source].weight for each in kept])
    draw = np.random.default_rng(0).random(len(kept))
    copies: NDArray[np.int64] = np.floor(weights).astype(np.int64) + (draw < weights % 1)
    return copies


def make_report(
    tally: Tally,
    kept: Examples,
    is_closed: NDArray[np.bool_],
    train: Examples,
    held_out: Examples | None,
) -> dict[str, Any]:
    response = int((kept.labels != IGNORE_INDEX).sum())
    total = len(kept.input_ids)
    return {
        "rows": {
            "loaded": tally.loaded,
            "where": tally.where,
            "kept": len(kept),
            "train": len(train),
            "eval": len(held_out) if held_out is not None else 0,
        },
        "dropped": dict(tally.dropped),
        "cut": tally.cut,
        "tokens": {
            "prompt": total - response,
            "response": response,
            "total": total,
            "max": int(kept.lengths.max(initial=0)),
        },
        "end_mark_share": float(is_closed.mean()) if len(kept) else 0.0,
        "places": tally.places,
    }


def digest_of(train: Examples, held_out: Examples | None) -> str:
    digest = hashlib.sha256()
    for examples in (train, held_out):
        for array in vars(examples).values() if examples else ():
            digest.update(array.tobytes())
    return digest.hexdigest()
