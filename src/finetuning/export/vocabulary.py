"""A tokenizer -> llama.cpp's vocabulary: tokens, merges or scores, and how text is cut."""

import json
from typing import TYPE_CHECKING, Any

from finetuning.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level tokenizers cut text -> llama.cpp's name for it; other ways of cutting are refused.
CUTS = {
    LLAMA_3: "llama-bpe",
    LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
    r" ?[^(\s|[.,!?…。，、।۔،])]+": "bloom",
}


def write_vocabulary(
    writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerFast", ends: list[int], size: int
) -> None:
    """The vocabulary of `size` embeddings and the tokens that end a response.

    Raises UserError for a tokenizer that llama.cpp would not cut text like.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE":
        raise unlike(backend["model"]["type"])
    if backend["model"].get("byte_fallback"):
        write_sentencepiece(writer, backend, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut_of(backend))
        writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_token_list(tokens_of(tokenizer, size))
    writer.add_token_types(types_of(backend, tokenizer, size))
    write_special_tokens(writer, tokenizer, ends)


def cut_of(backend: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts text before merging."""
    if (backend["normalizer"] or {}).get("type") not in (None, "NFC"):
        raise unlike(f"normalizer {backend['normalizer']['type']}")
    steps = steps_of(backend["pre_tokenizer"], "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise unlike("byte-level BPE with a prefix space, or none")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return "gpt-2"
    pattern = steps[0].get("pattern", {}).get("Regex")
    if len(steps) != 2 or steps[-1]["use_regex"] or pattern not in CUTS:
        raise unlike(f"byte-level BPE cut by {pattern!r}")
    return CUTS[pattern]


def write_sentencepiece(writer: "GGUFWriter", backend: dict[str, Any], size: int) -> None:
    """SentencePiece's BPE: of two neighbours those merge first whose piece has the higher score."""
    steps = [step["type"] for step in steps_of(backend["normalizer"], "normalizers")]
    cuts = steps_of(backend["pre_tokenizer"], "pretokenizers")
    scheme = cuts[0].get("prepend_scheme") if cuts else None
    if "Replace" not in steps and not scheme:
        raise unlike("BPE with byte fallback that is not SentencePiece's")
    scores = [float(-size)] * size
    for rank, pair in enumerate(backend["model"]["merges"]):
        number = backend["model"]["vocab"]["".join(pair)]
        scores[number] = max(scores[number], float(-rank))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_add_space_prefix("Prepend" in steps or scheme in ("first", "always"))


def steps_of(part: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's steps, in order."""
    if part is None:
        return []
    steps: list[dict[str, Any]] = part.get(several, [part])
    return steps


def tokens_of(tokenizer: "PreTrainedTokenizerFast", size: int) -> list[str]:
    """Every id's token; embeddings without one get a name of their own."""
    names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    return [name or f"[UNUSED{number}]" for number, name in enumerate(names)] + [
        f"[PAD{number}]" for number in range(len(names), size)
    ]


def types_of(backend: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", size: int) -> list[int]:
    from gguf import TokenType

    types: list[int] = [TokenType.NORMAL] * min(size, len(tokenizer))
    types += [TokenType.UNUSED] * (size - len(types))
    if backend["model"].get("byte_fallback"):
        for byte in range(256):
            types[backend["model"]["vocab"][f"<0x{byte:02X}>"]] = TokenType.BYTE
    for added in backend["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        types[added["id"]] = kind
    if tokenizer.unk_token_id is not None and tokenizer.unk_token != tokenizer.eos_token:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return types


def write_special_tokens(
    writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerFast", ends: list[int]
) -> None:
    """Beginning, end and padding. Nothing is added in front: the chat template spells it."""
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0]
    writer.add_eos_token_id(eos)
    others = [end for end in ends if end != eos]
    if len(others) > 2:
        raise UserError(f"export: a GGUF holds three tokens that end a response, not {len(ends)}")
    for add, end in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(end)


def unlike(what: str) -> UserError:
    return UserError(
        f"export: llama.cpp has no tokenizer like this one here ({what}); its own converter may "
        "know it by name: python convert_hf_to_gguf.py FOLDER --outfile model.gguf --outtype f32"
    )
