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
from tqdm import tqdm

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.readers import READERS
from finetuning.data.row import BadRow, Message
from finetuning.data.section import Data, Eval, Source
from finetuning.data.sources import Rows, load_rows
from finetuning.data.templates import TEMPLATES, MarkerTemplate, Segment
from finetuning.data.tokenization import IGNORE_INDEX, Examples, tokenize
from finetuning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on."""

    train: Examples
    eval: Examples | None
    report: dict[str, Any]
    """rows: {loaded, where, kept, train, eval}, dropped: {reason: rows}, cut: rows, tokens: {prompt, response, total,
    max} of the kept rows, end_mark_share of them (0..1), places: of the first few dropped rows"""
    fingerprint: str
    """digest of the examples: changes with any token, label or row number"""


def load_template(
    data: Data, tokenizer: "PreTrainedTokenizerFast"
) -> MarkerTemplate | ChatTemplate:
    """The recipe's template with the tokenizer's own special tokens.

    Raises UserError if the tokenizer lacks what the template needs.
    """
    if data.template == "chat":
        if not tokenizer.chat_template:
            others = ", ".join(name for name in TEMPLATES if name != "chat")
            raise UserError(
                f"data.template: chat, but the tokenizer has no chat template; allowed are {others}"
            )
        return ChatTemplate(tokenizer)
    if tokenizer.eos_token is None:
        raise UserError(
            f"data.template: {data.template} ends a response with the eos token, the tokenizer has none"
        )
    # What the tokenizer puts in front of every text (Llama, Gemma: yes; GPT-2, BLOOM: no) it was trained to see there.
    begins_with_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]
    bos = tokenizer.bos_token if begins_with_bos else None
    return MarkerTemplate(TEMPLATES[data.template], tokenizer.eos_token, bos, data.newline)


def training_texts(data: Data) -> Iterator[str]:
    """Every text of the rows with the markers around it, to train a tokenizer on.

    Of rows held out those of eval.split are left out; eval.every and eval.fraction count rows that fit max_length, and
    only a tokenizer can tell which. Raises UserError where a row does not fit the template, unless such are dropped.
    """
    template = MarkerTemplate(TEMPLATES[data.template], eos="", newline=data.newline)
    for conversation, segments in zip(*render_all(data, template, Tally(data)), strict=True):
        if not conversation.is_eval:
            yield from (segment.text for segment in segments if not segment.is_special)


class Conversation(NamedTuple):
    """A row that was read."""

    row: int
    source: int
    is_eval: bool
    messages: list[Message]
    place: str


class Tally:
    """Counts what becomes of the rows; `refuse` either raises or drops one, as the recipe says."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.loaded = self.where = self.cut = 0
        self.dropped: Counter[str] = Counter()
        self.places: list[str] = []

    def refuse(self, place: str, error: BadRow) -> None:
        if self.data.invalid_rows == "error":
            raise UserError(
                f"{place}: {error} (data.invalid_rows: drop leaves such rows out and counts them)"
            )
        self.drop("invalid", f"{place}: {error}")

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] <= 5:
            self.places.append(f"{reason}: {place}")


def build(data: Data, tokenizer: "PreTrainedTokenizerFast") -> Prepared:
    """The examples of the recipe's data section. Raises UserError where rows do not fit or nothing is left."""
    tally = Tally(data)
    conversations, segments = render_all(data, load_template(data, tokenizer), tally)
    whole = tokenize(segments, tokenizer, data.loss_on)
    kept, is_closed = fit(whole, conversations, tally)
    of_kept = [conversations[number] for number in kept]
    is_eval = held_out(of_kept, data.eval)
    copies = copies_by_weight(of_kept, data.sources)

    examples = whole.select(kept, data.max_length)
    examples = replace(
        examples, rows=np.array([conversation.row for conversation in of_kept], np.int64)
    )
    train = examples.select(np.repeat(np.arange(len(kept)), copies * ~is_eval))
    held = examples.select(np.flatnonzero(is_eval)) if data.eval else None
    report = make_report(tally, examples, is_closed, train, held)
    if len(train) == 0 or (held is not None and len(held) == 0):
        which = "train" if len(train) == 0 else "evaluate"
        raise UserError(
            f"nothing to {which} on: {json.dumps(report['rows'])}, dropped {json.dumps(report['dropped'])}"
        )
    return Prepared(train, held, report, digest_of(train, held))


def render_all(
    data: Data, template: MarkerTemplate | ChatTemplate, tally: Tally
) -> tuple[list[Conversation], list[list[Segment]]]:
    conversations, segments = [], []
    for conversation in tqdm(
        read_conversations(data, tally), desc="rendering", disable=None, leave=False
    ):
        try:
            segments.append(template.render(conversation.messages))
            conversations.append(conversation)
        except BadRow as error:
            tally.refuse(conversation.place, error)
    return conversations, segments


def read_conversations(data: Data, tally: Tally) -> Iterator[Conversation]:
    """Every row of every source that `where` keeps, read into messages; numbered through in the order of loading."""
    for number, source in enumerate(data.sources):
        splits = [(source, False)]
        if data.eval and data.eval.split:
            splits.append((source.model_copy(update={"split": data.eval.split}), True))
        for part, is_eval in splits:
            loaded = load_rows(part)
            check_columns(part.where, loaded)
            for index, row in enumerate(loaded.rows):
                if all(row.get(column) == value for column, value in part.where.items()):
                    tally.where += 1
                    try:
                        messages = READERS[part.reader](row)
                    except BadRow as error:
                        tally.refuse(loaded.place(index), error)
                        continue
                    place = loaded.place(index)
                    yield Conversation(tally.loaded + index, number, is_eval, messages, place)
            tally.loaded += len(loaded.rows)


def check_columns(where: dict[str, Any], loaded: Rows) -> None:
    for column in where:
        if not any(column in row for row in loaded.rows):
            columns = list(loaded.rows[0])
            hint = did_you_mean(column, columns)
            raise UserError(
                f"data.where: {loaded.files[0][0]} has no column {column}, it has {', '.join(columns)}{hint}"
            )


def fit(
    whole: Examples, conversations: list[Conversation], tally: Tally
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples that fit, or may be cut to fit, max_length with a token left to train; and for each
    whether the last token trained is the end mark of a response."""
    limit = tally.data.max_length
    is_long = whole.lengths > limit
    for number in np.flatnonzero(is_long):
        problem = f"{conversations[number].place}: {whole.lengths[number]} tokens, data.max_length is {limit}"
        if tally.data.overflow == "error":
            raise UserError(f"{problem} (data.overflow: drop or cut)")
        if tally.data.overflow == "drop":
            tally.drop("overflow", problem)
    is_dropped = is_long if tally.data.overflow == "drop" else np.zeros_like(is_long)

    is_trained = whole.labels != IGNORE_INDEX
    latest = np.maximum.accumulate(np.where(is_trained, np.arange(len(is_trained)), -1))
    starts = whole.ends - whole.lengths
    last = np.append(latest, -1)[
        starts + np.minimum(whole.lengths, limit) - 1
    ]  # last token trained, flat index
    has_response = (last >= starts) & (whole.lengths > 0)
    for number in np.flatnonzero(~has_response & ~is_dropped):
        tally.drop("no_response", conversations[number].place)
    kept = np.flatnonzero(has_response & ~is_dropped)
    tally.cut = int(is_long[kept].sum())
    is_closed = (last + 1 == whole.ends) | ~np.append(is_trained, False)[last + 1]
    return kept, is_closed[kept]


def held_out(kept: list[Conversation], split: Eval | None) -> np.ndarray:
    """(kept,) bool: which of the kept rows are for evaluation. The same on every machine and run."""
    numbers = np.arange(len(kept))
    if split is None:
        return np.zeros(len(kept), bool)
    if split.every:
        return numbers % split.every == 0
    if split.fraction:
        count = max(1, round(len(kept) * split.fraction))
        return np.isin(
            numbers, np.random.default_rng(split.seed or 0).permutation(len(kept))[:count]
        )
    return np.array([conversation.is_eval for conversation in kept], bool)


def copies_by_weight(kept: list[Conversation], sources: list[Source]) -> np.ndarray:
    """(kept,) int: how often each row is used; the fraction of a weight is a seeded draw."""
    weights = np.array([sources[conversation.source].weight for conversation in kept])
    draw = np.random.default_rng(0).random(len(kept))
    return np.floor(weights).astype(int) + (draw < weights % 1)


def make_report(
    tally: Tally, kept: Examples, is_closed: np.ndarray, train: Examples, held: Examples | None
) -> dict[str, Any]:
    response = int((kept.labels != IGNORE_INDEX).sum())
    total = len(kept.input_ids)
    return {
        "rows": {
            "loaded": tally.loaded,
            "where": tally.where,
            "kept": len(kept),
            "train": len(train),
            "eval": len(held) if held is not None else 0,
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


def digest_of(train: Examples, held: Examples | None) -> str:
    digest = hashlib.sha256()
    for examples in (train, held):
        for array in vars(examples).values() if examples else ():
            digest.update(array.tobytes())
    return digest.hexdigest()
