"""A block of rows -> its examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuning.data.chosen_template import load_template
from finetuning.data.examples import IGNORE_INDEX, Examples, train_on_all
from finetuning.data.groups import key_of, prompt_key, response_key, value_key
from finetuning.data.loading import LoadedRow
from finetuning.data.rendering import (
    Conversation,
    flaw_of,
    has_empty_response,
    read_row,
    render_row,
)
from finetuning.data.row import BadRow
from finetuning.data.section import SAME_TEXT, Data, Eval, Source
from finetuning.data.storage import Arrays
from finetuning.data.tally import Tally
from finetuning.data.templates import Segment, Template
from finetuning.data.tokenization import (
    examples_of,
    exceptions,
    require_special_tokens_found,
    spans_of,
)
from finetuning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Block(NamedTuple):
    """What became of a block of rows."""

    arrays: Arrays
    """of the examples that fit: those of Examples; sources and is_eval of LoadedRow; COUNTED; Keys:
    copies of the tokens, and SHARED"""
    tally: Tally


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
