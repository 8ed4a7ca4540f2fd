"""Copies of a tokenizer that read no special token out of a row's text."""

import copy
import json
import re
import secrets
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

# In front of the names of special tokens, where texts are encoded: no row can spell it.
SECRET = f"\ue002{secrets.token_hex(8)}"


def with_secret_names(tokenizer: Tokenizer) -> Tokenizer:
    """A copy whose special tokens have secret names, so that no text of a row spells one.

    `encode_special_tokens` is not enough: a Unigram model has special tokens among its pieces
    (llm-jp's does) and finds them, and those of byte fallback (`<0x0A>`), in any text.
    """
    settings = json.loads(tokenizer.to_str())
    special = [token["content"] for token in settings["added_tokens"] if token["special"]]
    secret = {content: SECRET + content for content in special}
    for token in settings["added_tokens"]:
        token["content"] = secret.get(token["content"], token["content"])
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {secret.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[secret.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
    settings.update(post_processor=None, truncation=None, padding=None)
    renamed = Tokenizer.from_str(json.dumps(settings))
    if model["type"] == "Unigram" and model.get("byte_fallback"):
        apart = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
        renamed.pre_tokenizer = pre_tokenizers.Sequence([*steps_of(renamed.pre_tokenizer), apart])
    return renamed


def without_prefix_space(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that puts nothing in front of a text: a copy, or the same if it never does."""
    # A normalizer that adds to a plain letter adds to every text: Prepend, or Replace of its start.
    kept = [step for step in steps_of(tokenizer.normalizer) if step.normalize_str("a") == "a"]
    if len(kept) == len(steps_of(tokenizer.normalizer)) and not any(
        map(may_prefix, steps_of(tokenizer.pre_tokenizer))
    ):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.normalizer = normalizers.Sequence(kept)
    splitting = steps_of(tokenizer.pre_tokenizer)  # of the copy: steps belong to their tokenizer
    for step in filter(may_prefix, splitting):
        if isinstance(step, pre_tokenizers.Metaspace):
            step.prepend_scheme = "never"
        else:
            step.add_prefix_space = False
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitting)
    return tokenizer


def may_prefix(step: Any) -> bool:
    if isinstance(step, pre_tokenizers.ByteLevel):
        return bool(step.add_prefix_space)
    return isinstance(step, pre_tokenizers.Metaspace)


def steps_of(part: Any) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    is_sequence = isinstance(part, (normalizers.Sequence, pre_tokenizers.Sequence))
    return [*part] if is_sequence else [part]


def spellings(tokenizer: Tokenizer) -> re.Pattern[str]:
    """What the tokenizer itself reads as a special token, or as a byte of a Unigram model."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = tokenizer.get_added_tokens_decoder().values()
    texts = [re.escape(token.content) for token in tokens if token.special]
    if model["type"] == "Unigram" and model.get("byte_fallback"):
        texts.append("<0x[0-9A-F]{2}>")
    return re.compile("|".join(texts) if texts else r"(?!)")
