"""The base model's tokenizer, or one trained from scratch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError, one_line
from finetuning.model.location import location
from finetuning.recipe.sections import FromScratch, Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"  # the one special token of a tokenizer from scratch


def load_tokenizer(model: Model, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """The base model's tokenizer with a pad token; with `from_scratch` one trained on the texts.

    Raises UserError where there is none, or none that tokenizes in batches.
    """
    if model.from_scratch:
        return train_tokenizer(model.from_scratch, texts)
    return read_tokenizer(location(model), model.revision)


def read_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a local folder or Hub id."""
    # AutoTokenizer imports torch (3 s) to find a class that knows what the files do not say.
    from transformers import PreTrainedTokenizerFast

    which: dict[str, Any] = {"revision": revision}
    tokenizer: PreTrainedTokenizerFast
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **which)
    except (OSError, ValueError, TypeError):
        tokenizer = convert_tokenizer(name, revision)
    # As in openai-community/gpt2, whose files name no special token.
    if tokenizer.eos_token is None:
        tokenizer = convert_tokenizer(name, revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def convert_tokenizer(name: str, revision: str | None) -> "PreTrainedTokenizerFast":
    """A tokenizer as the Auto class makes it.

    It converts one without tokenizer.json (a SentencePiece model, say), and knows classes that have
    special tokens of their own. Raises UserError where none can be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"model.name: {name} has no tokenizer that can be read: {one_line(error)}"
        ) from None
    # Of a folder without any vocabulary it makes a tokenizer that knows no text.
    known = tokenizer("a", add_special_tokens=False).input_ids
    if not known or tokenizer.unk_token_id in known:
        raise UserError(
            f"model.name: {name} has no tokenizer that can be read: its vocabulary is empty"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"model.name: {name} has only a slow tokenizer; one that converts to tokenizer.json is "
            "needed"
        )
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def train_tokenizer(settings: FromScratch, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of at most vocab_size tokens; the same for the same texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )
