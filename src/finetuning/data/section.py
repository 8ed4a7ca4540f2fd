"""The data section of a recipe."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from finetuning.data.preferences import PREFERENCE_READERS
from finetuning.data.readers import READERS
from finetuning.data.templates import CHAT, TEMPLATES, TEXT
from finetuning.section import Section

if TYPE_CHECKING:
    ReaderName = str
    TemplateName = str
else:  # a recipe with another name is refused with the allowed ones
    ReaderName = Literal[(*READERS, *PREFERENCE_READERS)]
    TemplateName = Literal[(*TEMPLATES, CHAT)]


SAME_TEXT = "same_text"


class Eval(Section):
    """Which examples are the evaluation set: one of `every`, `fraction`, `split`."""

    every: int | None = Field(default=None, ge=2, le=10**9)
    """examples: of those kept, number 0, every, 2 * every, ... are evaluated on, not trained on"""
    fraction: float | None = Field(default=None, gt=0, lt=1)
    """share of the examples, 0..1, drawn at random"""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """of the draw for `fraction`; 0 if not given"""
    split: str | None = Field(default=None, min_length=1)
    """name of another split of the same data"""
    group_by: str | None = SAME_TEXT
    """same_text: rows that share their prompt or a long response are all trained or all evaluated
    on; a column: so are rows that share its value; null: every row is drawn alone"""

    @model_validator(mode="before")
    @classmethod
    def draw_alone(cls, settings: Any) -> Any:
        """No groups where a split is named, nor in a recipe that was saved before there were any.

        A saved recipe says every key, and such a one all but this.
        """
        if not isinstance(settings, dict) or "group_by" in settings:
            return settings
        is_saved = {"every", "fraction", "seed", "split"} <= settings.keys()
        is_named = settings.get("split") is not None
        return {**settings, "group_by": None} if is_saved or is_named else settings

    @model_validator(mode="after")
    def check(self) -> "Eval":
        given = [name for name in ("every", "fraction", "split") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of every, fraction and split must be given, found {given or 'none'}"
            )
        if self.seed is not None and self.fraction is None:
            raise ValueError("seed belongs to fraction: every and split draw nothing")
        if self.group_by is not None and self.split is not None:
            raise ValueError("group_by belongs to every and fraction: a named split is as it is")
        return self


class RowSettings(Section):
    """Which rows, and how they are read."""

    path: str | list["Source"] = Field(min_length=1)
    """Hub id, or a local json, jsonl, csv or parquet file (also .gz) or a folder of them"""
    config: str | None = None
    """configuration (subset) of a Hub data set"""
    revision: str | None = None
    """branch, tag or commit of a Hub data set"""
    split: str = "train"
    """name of the split"""
    reader: ReaderName | None = None
    """how a row is read: into messages for src/sft.py; preference, scored_responses and hh_rlhf
    into pairs for src/dpo.py"""
    columns: dict[str, str | None] = Field(default_factory=dict)
    """{the reader's name of a column: the data's name}; null leaves a column out"""
    sessions: int | None = Field(default=None, ge=1, le=10**9)
    """reader harry_potter: only the first sessions of the file"""
    where: dict[str, Any] = Field(default_factory=dict)
    """keep only rows whose columns equal these values"""
    weight: float = Field(default=1.0, gt=0, le=10**6)
    """times each training example is used: 0.5 is a seeded half of them, 2 each one twice"""

    @model_validator(mode="after")
    def check_sessions(self) -> "RowSettings":
        if self.sessions is not None and self.reader not in ("harry_potter", None):
            raise ValueError("sessions belongs to reader: harry_potter")
        return self


class Source(RowSettings):
    """Rows of one kind."""

    path: str = Field(min_length=1)
    """Hub id, or a local json, jsonl, csv or parquet file (also .gz) or a folder of them"""


class Data(RowSettings):
    """What is trained on, and how a row becomes tokens."""

    path: str | list[Source] = Field(min_length=1)
    """Hub id, local file or folder; a list of {path, ...} mixes several, each with own settings"""
    invalid_rows: Literal["error", "drop"] = "error"
    """a row that does not fit its reader or template: refuse the run, or drop and count it"""
    template: TemplateName
    """how messages are written as text"""
    chat_template: str | None = None
    """template chat: a file, or a name of the tokenizer's or of trl's, instead of its default"""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """template chat: variables that it is asked with, such as {enable_thinking: false}"""
    newline: str | None = None
    """written instead of every line feed, such as <NL>; undone in answers"""
    duplicates: Literal["keep", "drop"] | None = None
    """examples that are copies of earlier ones, token by token: keep and count, or drop; keep if
    not given"""
    max_length: int = Field(default=512, ge=2, le=10**9)
    """tokens of an example at most, end mark included"""
    overflow: Literal["drop", "cut", "error"] = "drop"
    """a longer example: drop and count it, cut it (and its end mark), or refuse the run"""
    loss_on: Literal["response", "last_response", "all"] = "response"
    """tokens that are trained: responses and their end marks, the last one's, or all of them"""
    turns: Literal["together", "each"] | None = None
    """a conversation is one example, or one for each response; null: together where that works"""
    num_proc: int | None = Field(default=None, ge=1, le=1024)
    """processes that prepare the rows; as many as there are cores if not given"""
    layout: Literal["packed", "padded"] = "packed"
    """layout of a batch in memory: one example after another, or padded; memory and speed only"""
    order: Literal["random", "by_length", "sequential"] = "random"
    """of the examples in an epoch, drawn from training.seed; by_length: similar lengths together"""
    batch_tokens: int | None = Field(default=None, ge=1, le=10**9)
    """tokens of a micro-batch at most, instead of training.per_device_train_batch_size examples"""
    eval: Eval | None = None
    """which examples are the evaluation set"""

    @model_validator(mode="after")
    def check_data(self) -> "Data":
        if self.newline is not None and self.template == CHAT:
            raise ValueError(
                "newline does not go with template: chat, whose line feeds are the tokenizer's own"
            )
        for name in ("chat_template", "chat_template_kwargs"):
            if getattr(self, name) and self.template != CHAT:
                raise ValueError(f"{name} belongs to template: chat")
        for source in self.sources:
            if source.reader is None:
                allowed = ", ".join((*READERS, *PREFERENCE_READERS))
                raise ValueError(f"reader is missing for {source.path}; allowed are {allowed}")
            if source.reader == TEXT and self.template != TEXT:
                raise ValueError("reader: text goes with template: text")
            if self.eval and self.eval.split == source.split:
                raise ValueError(
                    f"eval.split {source.split} is what is trained on; name another split"
                )
        return self

    @model_validator(mode="after")
    def check_pairs(self) -> "Data":
        pairs = [source.reader for source in self.sources if source.reader in PREFERENCE_READERS]
        if not pairs:
            return self
        if others := [each.reader for each in self.sources if each.reader not in pairs]:
            raise ValueError(f"reader: {pairs[0]} reads pairs, {others[0]} does not; mix one kind")
        for name, only in (("loss_on", "response"), ("turns", None)):
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}: {getattr(self, name)} does not go with reader: {pairs[0]}: the two "
                    "responses of a pair are compared; leave it out"
                )
        return self

    @property
    def is_preference(self) -> bool:
        """Whether an example is a pair of responses."""
        return any(source.reader in PREFERENCE_READERS for source in self.sources)

    @property
    def sources(self) -> list[Source]:
        """What rows are read from, each with the settings of the data section filled in."""
        if isinstance(self.path, str):
            entries = [{"path": self.path}]
        else:
            entries = [source.model_dump(exclude_unset=True) for source in self.path]
        shared = {name: getattr(self, name) for name in Source.model_fields}
        return [Source(**{**shared, **entry}) for entry in entries]
