"""Recipe and tokenizer -> training and evaluation examples, every row accounted for.

load -> where -> read -> render -> tokenize -> overflow -> duplicates -> eval split -> weight

Rows are read and worked on in blocks, by as many processes as there are cores, and what becomes of
them is on disk at once: memory does not grow with the number of rows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from finetuning.data.chat_template import ChatTemplate
from finetuning.data.examples import IGNORE_INDEX, Examples, train_on_all
from finetuning.data.groups import first_of_group, key_of, prompt_key, response_key, value_key
from finetuning.data.rendering import (
    Conversation,
    flaw_of,
    has_empty_response,
    read_row,
    render_row,
)
from finetuning.data.row import BadRow, Row
from finetuning.data.section import SAME_TEXT, Data, Eval, Source
from finetuning.data.sources import stream_rows
from finetuning.data.storage import Arrays, GrowingArrays, seal, write_examples
from finetuning.data.templates import CHAT, TEMPLATES, MarkerTemplate, Segment, Template
from finetuning.data.tokenization import (
    examples_of,
    exceptions,
    require_special_tokens_found,
    spans_of,
)
from finetuning.data.workers import cores, map_in_order
from finetuning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of each example, and added up in the report: its trained tokens; whether it was cut; whether its
# last trained token is an end mark; spelled and merged of Exceptions.
COUNTED = ("trained", "cut", "closed", "spelled", "merged")
SHARED = ("row_keys", "prompts", "responses")  # keys of rows that stay on one side of the split
SHOWN_PLACES = 5  # dropped rows of a reason that the report names
BLOCK_ROWS, BLOCK_TEXT = 2048, 2**22  # rows and characters that are worked on at once, about


class LoadedRow(NamedTuple):
    """A row that `where` keeps."""

    number: int
    """in order of loading, from 0"""
    source: int
    is_eval: bool
    """of the split that data.eval.split names"""
    place: str
    columns: Row


@dataclass
class Tally:
    """Counts what becomes of rows."""

    counts: Counter[str] = field(default_factory=Counter)
    """loaded, where, read: rows; made: examples of the rows that were read; empty: rows with a
    trained response of no text; duplicates: examples"""
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    """of the first few dropped rows of each reason"""
    unused: set[str] = field(default_factory=set)
    """columns, and keys of turns, that nothing was read of"""

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < SHOWN_PLACES:
            places.append(f"{reason}: {place}")

    def add(self, other: "Tally") -> None:
        self.counts += other.counts
        self.dropped += other.dropped
        self.unused |= other.unused
        for reason, places in other.places.items():
            self.places[reason] = (self.places.get(reason, []) + places)[:SHOWN_PLACES]


class Block(NamedTuple):
    """What became of a block of rows."""

    arrays: Arrays
    """of the examples that fit: those of Examples; sources and is_eval of LoadedRow; COUNTED; Keys:
    copies of the tokens, and SHARED"""
    tally: Tally


def build(data: Data, tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Writes the examples of the recipe's data section, for read_prepared, into an empty folder.

    Raises UserError where rows do not fit or nothing is left to train or evaluate on.
    """
    preparation = Preparation(data, tokenizer)
    tally, kept = Tally(), GrowingArrays(folder)
    # Makes here what every process needs, before they are forked from this one.
    kept.append(preparation([]).arrays)
    blocks = blocks_of_rows(data, tally)
    for block in map_in_order(preparation, blocks, data.num_proc or cores()):
        kept.append(block.arrays)
        tally.add(block.tally)
    arrays = kept.mapped()
    group_by = data.eval.group_by if data.eval else None
    if group_by and group_by != SAME_TEXT:
        tally.unused.discard(group_by)
        if len(arrays["prompts"]) and not arrays["prompts"].any():
            raise UserError(f"data.eval.group_by: no row has a column {group_by}")
    numbers = without_duplicates(arrays, data, tally)
    same = first_of_group(*(arrays[name][numbers] for name in SHARED))
    groups = same if group_by else first_of_group(arrays["row_keys"][numbers])
    is_eval = evaluation_set(arrays["is_eval"][numbers], groups, data.eval)
    copies = copies_by_weight(arrays["sources"][numbers], data.sources)
    train = np.repeat(numbers, copies * ~is_eval)
    held_out = numbers[is_eval]
    report = make_report(tally, arrays, numbers, len(train), len(held_out))
    report["leaked"] = int(np.isin(same[is_eval], same[~is_eval]).sum())
    report["added_end_mark"] = preparation.template.added_end_mark
    if len(train) == 0 or (data.eval and len(held_out) == 0):
        which = "train" if len(train) == 0 else "evaluate"
        counts = f"{json.dumps(report['rows'])}, dropped {json.dumps(report['dropped'])}"
        hint = "; data.eval.group_by: null draws each row alone" if np.any(groups[1:] == 0) else ""
        raise UserError(f"nothing to {which} on: {counts}{hint}")

    digest = hashlib.sha256()
    write_examples(folder, "train", arrays, train, digest)
    if data.eval:
        write_examples(folder, "eval", arrays, held_out, digest)
    seal(folder, report, digest.hexdigest())


@dataclass(frozen=True)
class Preparation:
    """A block of rows -> its examples."""

    data: Data
    tokenizer: "PreTrainedTokenizerFast"

    @cached_property
    def template(self) -> Template:
        return load_template(self.data, self.tokenizer)

    @cached_property
    def sources(self) -> list[Source]:
        return self.data.sources

    def __call__(self, rows: list[LoadedRow]) -> Block:
        """Raises UserError where a row does not fit, unless such rows are dropped."""
        tally, by_example = Tally(), self.by_example
        rendered = list(self.render(rows, tally))
        segments = [of_example for _, _, of_example in rendered]
        spans = spans_of(segments, self.tokenizer)
        responses = examples_of(spans, self.tokenizer)
        whole = train_on_all(responses) if self.data.loss_on == "all" else responses
        kept = self.fit(whole, [row.place for row, _, _ in rendered], tally)

        # Of sequences; a pair has two.
        examples = whole.select(kept, self.data.max_length)
        is_closed = ends_with_mark(
            responses.select(kept, self.data.max_length), self.template, self.tokenizer
        )
        other = exceptions([spans[number] for number in kept], self.tokenizer)
        kept_segments = [segments[number] for number in kept]
        require_special_tokens_found(kept_segments, other, self.tokenizer)
        trained = np.add.reduceat(examples.labels != IGNORE_INDEX, examples.ends - examples.lengths)
        counted = {
            "trained": by_example(trained).sum(1, dtype=np.int32),
            "cut": by_example(whole.lengths[kept] > self.data.max_length).any(1),
            "closed": by_example(is_closed).all(1),
            "spelled": by_example(other.spelled).any(1),
            "merged": by_example(other.merged).any(1),
        }
        if self.data.is_preference:
            examples = examples.in_pairs()
            counted["of_chosen"] = by_example(trained)[:, 0].astype(np.int32)
        made_of = [rendered[number][:2] for number in by_example(kept)[:, 0]]
        return Block({**arrays_of(examples, made_of, self.data.eval), **counted}, tally)

    def render(
        self, rows: list[LoadedRow], tally: Tally
    ) -> Iterator[tuple[LoadedRow, Conversation, list[Segment]]]:
        """The segments of every sequence, and what it is made of."""
        for row in rows:
            try:
                conversation = read_row(row.columns, self.sources[row.source])
                if flaw := flaw_of(conversation):
                    tally.drop(flaw, row.place)
                    continue
                sequences = render_row(
                    conversation, self.template, self.data.loss_on, self.data.turns
                )
            except BadRow as error:
                refuse(row.place, error, self.data, tally)
                continue
            tally.unused |= conversation.unused
            made = len(sequences) // self.sequences
            tally.counts["read"] += 1
            tally.counts["made"] += made
            tally.counts["empty"] += has_empty_response(conversation.messages)
            for segments in sequences:
                yield row, conversation, segments

    @cached_property
    def sequences(self) -> int:
        """Of an example: a pair has two, one after the other."""
        return 2 if self.data.is_preference else 1

    def by_example(self, of_sequences: NDArray[Any]) -> NDArray[Any]:
        """(examples, sequences) what was (examples * sequences,)."""
        return of_sequences.reshape(-1, self.sequences)

    def fit(self, whole: Examples, places: list[str], tally: Tally) -> NDArray[np.int64]:
        """(kept,) numbers of the sequences that fit max_length and have a token left to train; of a
        pair both do.

        With data.overflow: cut all fit, of which only the first tokens count.
        """
        limit, places = self.data.max_length, places[:: self.sequences]
        is_long = self.by_example(whole.lengths > limit).any(1)
        self.check_overflow(whole, np.flatnonzero(is_long), places, tally)
        is_dropped = is_long & (self.data.overflow == "drop")

        has_response = self.by_example(last_trained(whole, limit) >= 0).all(1)
        for number in np.flatnonzero(~has_response & ~is_dropped):
            tally.drop("no_response", places[number])
        is_equal = is_long & has_response & ~is_dropped & self.are_equal(whole)
        for number in np.flatnonzero(is_equal):
            tally.drop("equal_when_cut", places[number])
        is_kept = has_response & ~is_dropped & ~is_equal
        return np.flatnonzero(np.repeat(is_kept, self.sequences))

    def are_equal(self, whole: Examples) -> NDArray[np.bool_]:
        """(examples,) whether cut to max_length the two sequences of a pair are the same."""
        if not self.data.is_preference:
            return np.zeros(len(whole), bool)
        limit, starts = self.data.max_length, whole.ends - whole.lengths
        begins = [
            whole.input_ids[start : start + min(length, limit)]
            for start, length in zip(starts, whole.lengths, strict=True)
        ]
        pairs = zip(begins[::2], begins[1::2], strict=True)
        return np.array([np.array_equal(*pair) for pair in pairs], bool)

    def check_overflow(
        self, whole: Examples, too_long: NDArray[np.int64], places: list[str], tally: Tally
    ) -> None:
        lengths = self.by_example(whole.lengths)
        for number in too_long:
            tokens = " and ".join(map(str, lengths[number]))
            problem = (
                f"{places[number]}: {tokens} tokens, data.max_length is {self.data.max_length}"
            )
            if self.data.overflow == "error":
                raise UserError(f"{problem} (data.overflow: drop or cut)")
            if self.data.overflow == "drop":
                tally.drop("overflow", problem)


def refuse(place: str, error: BadRow, data: Data, tally: Tally) -> None:
    """Raises UserError or drops the row, as data.invalid_rows says."""
    if data.invalid_rows == "error":
        hint = "data.invalid_rows: drop leaves such rows out and counts them"
        raise UserError(f"{place}: {error} ({hint})")
    tally.drop("invalid", f"{place}: {error}")


def arrays_of(
    examples: Examples, made_of: list[tuple[LoadedRow, Conversation]], split: Eval | None
) -> Arrays:
    """What is kept of each example and of the row that it was made of."""
    rows = np.array([row.number for row, _ in made_of], np.int64)
    of_examples = {name: array for name, array in vars(examples).items() if array is not None}
    tokens = np.split(np.stack([examples.input_ids, examples.labels], 1), examples.ends[:-1])
    column = split.group_by if split else None
    if column in (None, SAME_TEXT):
        groups = [(prompt_key(each.messages), response_key(each.messages)) for _, each in made_of]
    else:
        groups = [(value_key(row.columns.get(str(column))), 0) for row, _ in made_of]
    prompts, responses = np.array(groups, np.uint64).reshape(-1, 2).T
    return {
        **{**of_examples, "rows": rows},
        "sources": np.array([row.source for row, _ in made_of], np.int32),
        "is_eval": np.array([row.is_eval for row, _ in made_of], bool),
        "copies": np.array([key_of(each.tobytes()) for each in tokens if len(each)], np.uint64),
        "row_keys": (rows + 1).astype(np.uint64),
        "prompts": prompts,
        "responses": responses,
    }


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
        try:
            template.check()
        except BadRow as error:
            raise UserError(f"data.template: chat: {error}; use another template") from None
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


def blocks_of_rows(data: Data, tally: Tally) -> Iterator[list[LoadedRow]]:
    """Every row that `where` keeps, in order of loading, some at a time."""
    block: list[LoadedRow] = []
    text = 0
    rows = load_rows(data, tally)
    for row in tqdm(rows, desc="preparing", unit=" rows", disable=None, leave=False, delay=1):
        block.append(row)
        text += text_in(row.columns)
        if len(block) == BLOCK_ROWS or text > BLOCK_TEXT:
            yield block
            block, text = [], 0
    if block:
        yield block


def text_in(value: Any) -> int:
    """Characters in a value of a row, about."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(text_in, value.values()))
    return sum(map(text_in, value)) if isinstance(value, list) else 0


def load_rows(data: Data, tally: Tally) -> Iterator[LoadedRow]:
    """Every row that `where` keeps. Rows are numbered in order of loading."""
    for number, source in enumerate(data.sources):
        yield from load_split(source, number, False, tally)
        if data.eval and data.eval.split:
            other = source.model_copy(update={"split": data.eval.split})
            yield from load_split(other, number, True, tally)


def load_split(source: Source, number: int, is_eval: bool, tally: Tally) -> Iterator[LoadedRow]:
    unseen, first = set(source.where), ("", Row())
    for name, rows in stream_rows(source):
        for index, row in enumerate(rows):
            first = first if first[0] else (name, row)
            unseen -= row.keys()
            tally.counts["loaded"] += 1
            if matches(row, source.where):
                tally.counts["where"] += 1
                place = f"{name}: row {index}"
                yield LoadedRow(tally.counts["loaded"] - 1, number, is_eval, place, row)
    for column in source.where:
        if column in unseen:
            raise no_such_column(column, *first)


def matches(row: Row, where: dict[str, Any]) -> bool:
    return all(row.get(column) == value for column, value in where.items())


def no_such_column(column: str, name: str, row: Row) -> UserError:
    found = f"it has {', '.join(row)}{did_you_mean(column, row)}"
    return UserError(f"data.where: {name} has no column {column}, {found}")


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


def without_duplicates(arrays: Arrays, data: Data, tally: Tally) -> NDArray[np.int64]:
    """(kept,) numbers of the examples, without copies of earlier ones where the recipe says so."""
    first = first_of_group(arrays["copies"])
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


def make_report(
    tally: Tally, arrays: Arrays, kept: NDArray[np.int64], train: int, held_out: int
) -> dict[str, Any]:
    """Of the examples of these numbers, so many of which are trained and evaluated on."""
    counts, lengths = tally.counts, arrays["lengths"][kept]
    chosen = arrays.get("chosen", arrays["lengths"])[kept]
    longest = np.maximum(chosen, lengths - chosen)
    total = int(lengths.sum())
    counted = {name: int(arrays[name][kept].sum()) for name in COUNTED}
    report: dict[str, Any] = {
        "rows": {
            "loaded": counts["loaded"],
            "where": counts["where"],
            "kept": len(kept),
            "train": train,
            "eval": held_out,
        },
        "dropped": {reason: count for reason, count in tally.dropped.items() if count},
        "cut": counted["cut"],
        "tokens": {
            "prompt": total - counted["trained"],
            "response": counted["trained"],
            "total": total,
            "max": int(longest.max(initial=0)),
        },
        "end_mark_share": counted["closed"] / len(kept) if len(kept) else 0.0,
        "places": [place for places in tally.places.values() for place in places],
        "spelled": counted["spelled"],
        "merged": counted["merged"],
        "duplicates": counts["duplicates"],
        "empty": counts["empty"],
        "conversations": counts["read"] if counts["made"] > counts["read"] else 0,
        "examples": counts["made"],
        "unused": sorted(tally.unused),
    }
    if "of_chosen" in arrays:
        report["pairs"] = lengths_of_pairs(arrays["of_chosen"][kept], arrays["trained"][kept])
    return report


def lengths_of_pairs(chosen: NDArray[np.int32], both: NDArray[np.int32]) -> dict[str, float]:
    """Mean trained tokens, and the share of pairs that their lengths tell apart."""
    rejected = both - chosen
    means: dict[str, NDArray[Any]] = {"chosen": chosen, "rejected": rejected}
    means |= {"chosen_longer": chosen > rejected, "chosen_shorter": chosen < rejected}
    return {name: float(each.mean()) if len(each) else 0.0 for name, each in means.items()}
