"""The base model's tokenizer, or one trained from scratch."""

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError, one_line
from finetuning.model.location import adapter_folder, location
from finetuning.recipe.sections import FromScratch, Model
from finetuning.untrusted_text import short_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"  # the one special token of a tokenizer from scratch
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Of these, and of an adapter's folder, AutoTokenizer does not mistrust the class that is named.
PLAIN_MODELS = (None, "bloom", "gpt2", "gpt_neox", "llama")


def load_tokenizer(model: Model, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """The base model's tokenizer with a pad token; with `from_scratch` one trained on the texts.

    Raises UserError where there is none, or none that tokenizes in batches.
    """
    if model.from_scratch:
        return train_tokenizer(model.from_scratch, texts)
    folder = adapter_folder(model)
    if folder and (folder / "tokenizer.json").is_file():  # with the template it was trained with
        tokenizer = read_tokenizer(str(folder))
    else:
        tokenizer = read_tokenizer(location(model), model.revision)
    require_same_when_saved(tokenizer)
    return tokenizer


def read_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a local folder or Hub id, of the class that AutoTokenizer finds for it.

    Another class may give other ids: LlamaTokenizer does not do what its tokenizer.json says.
    Raises UserError where there is none, or none that tokenizes in batches.
    """
    tokenizer = plain_tokenizer(name, revision) or auto_tokenizer(name, revision)
    require_template_names(name, tokenizer)
    for name_of_loading in ("is_local", "local_files_only"):  # would be saved with it
        tokenizer.init_kwargs.pop(name_of_loading, None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def require_template_names(name: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raises UserError for names that could not be files, when the tokenizer is saved."""
    templates: Any = tokenizer.chat_template
    for template in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"\w[\w.-]*", template):
            raise UserError(
                f"model.name: {name} has a chat template called {short_line(template)}, which "
                "cannot be a file; names are of letters, digits, `_`, `.` and `-`"
            )


def plain_tokenizer(name: str, revision: str | None) -> "PreTrainedTokenizerFast | None":
    """The tokenizer where AutoTokenizer does no more than read tokenizer.json; None elsewhere.

    Because AutoTokenizer imports torch (3 s).
    """
    from transformers import PreTrainedTokenizerFast

    which: dict[str, Any] = {"revision": revision}
    try:
        settings = read_settings(name, "tokenizer_config.json", revision)
        model_type = read_settings(name, "config.json", revision).get("model_type")
        is_plain = settings.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in settings
        if is_plain and model_type in PLAIN_MODELS and settings.get("eos_token"):
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
                name, **which
            )
            return tokenizer
    except (OSError, ValueError, TypeError):
        pass
    return None


def read_settings(name: str, file: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a local folder or Hub id; {} if it is not there."""
    from transformers.utils.hub import cached_file

    path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    return settings


def auto_tokenizer(name: str, revision: str | None) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
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


def require_same_when_saved(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raises UserError unless AutoTokenizer makes the same of the saved tokenizer."""
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:  # all of it is in tokenizer.json
        return
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ours, theirs = tokenizer.backend_tokenizer.to_str(), saved.backend_tokenizer.to_str()
    if type(saved) is not type(tokenizer) or theirs != ours:
        raise UserError(
            f"model.name: the tokenizer, a {type(tokenizer).__name__}, changes when it is saved "
            "and loaded: other programs would give the trained model other token ids"
        )


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
