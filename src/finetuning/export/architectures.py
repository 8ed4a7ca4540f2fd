"""What llama.cpp calls the settings and weights of an architecture, and how it wants them laid out.

From llama.cpp's convert_hf_to_gguf.py (MIT): the names are the `gguf` library's, the permutations
are pinned by tests that ask llama.cpp.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetuning.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

Change = Callable[[str, torch.Tensor, Any], torch.Tensor]
Settings = Callable[["GGUFWriter", Any], None]
SCALED_BY_PAIR = ("llama3",)  # rope types
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures."""

    name: str
    """general.architecture"""
    write_settings: Settings
    """what is not the same for all: writer, config"""
    change: Change
    """a weight as llama.cpp wants it: name in the model's state dict, weight, config"""
    is_supported: Callable[[Any], bool]
    """whether llama.cpp computes what a model of this config computes"""
    more: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}
    """weights that transformers computes from the config instead, by llama.cpp's names"""


def architecture_of(config: Any) -> Architecture:
    """Raises UserError for a model that is not exported here."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None or not found.is_supported(config):
        names = ", ".join(ARCHITECTURES)
        what = config.model_type if found is None else f"this kind of {config.model_type}"
        raise UserError(
            f"export: {what} is not exported here; exported are {names}. llama.cpp's "
            "convert_hf_to_gguf.py may know it: give it a folder with full weights, a run folder "
            "or what publish.merged=true published: "
            "python convert_hf_to_gguf.py FOLDER --outfile model.gguf --outtype f32"
        )
    return found


def write_common_settings(writer: "GGUFWriter", config: Any) -> None:
    """Sizes that every architecture has."""
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    writer.add_head_count_kv(heads)
    writer.add_vocab_size(config.vocab_size)


def context_length(config: Any) -> int:
    """Positions that the model reads; BLOOM's alibi has no end, 2,048 is what it was trained on."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions or getattr(config, "seq_length", None) or 2048)


# GPT-2


def gpt2_settings(writer: "GGUFWriter", config: Any) -> None:
    writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def gpt2_change(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Conv1D holds (in, out), everything else (out, in)."""
    return weight.T if re.search(r"\.(c_attn|c_fc|c_proj)\.weight$", name) else weight


def is_plain_gpt2(config: Any) -> bool:
    return (
        config.activation_function in TANH_GELU
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
    )


# BLOOM


def bloom_settings(writer: "GGUFWriter", config: Any) -> None:
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def bloom_change(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Query, key and value are stored head by head; llama.cpp wants each of the three whole."""
    if ".query_key_value." not in name:
        return weight
    heads = config.num_attention_heads
    parts = weight.reshape(heads, 3, config.hidden_size // heads, *weight.shape[1:])
    return parts.transpose(0, 1).reshape(weight.shape)


# Llama, Mistral, Qwen


def llama_settings(writer: "GGUFWriter", config: Any) -> None:
    from gguf import RopeScalingType

    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = head_width(config)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rotary_factors(config: Any) -> dict[str, torch.Tensor]:
    """What llama.cpp divides the frequency of each rotary pair by (head width / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, width = config.rope_parameters, head_width(config)
    if rope["rope_type"] not in SCALED_BY_PAIR:
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    return {"rope_freqs.weight": plain / scaled}


def llama_change(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Rotary pairs are neighbours in llama.cpp's Llama, halves apart in transformers'."""
    if not (found := re.search(r"\.([qk])_proj\.", name)):
        return weight
    heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def unchanged(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    return weight


def head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def is_llama(config: Any) -> bool:
    """Of llama.cpp's architectures only this one reads factors of its rotary pairs."""
    return is_plain_llama(config, ("default", "linear", *SCALED_BY_PAIR))


def is_plain_llama(config: Any, ropes: tuple[str, ...] = ("default", "linear")) -> bool:
    sliding = getattr(config, "sliding_window", None)
    is_whole = not sliding or sliding >= config.max_position_embeddings
    is_rope_known = config.rope_parameters["rope_type"] in ropes
    return config.hidden_act == "silu" and is_whole and is_rope_known


LLAMA = Architecture("llama", llama_settings, llama_change, is_llama, rotary_factors)
ARCHITECTURES = {
    "gpt2": Architecture("gpt2", gpt2_settings, gpt2_change, is_plain_gpt2),
    "bloom": Architecture(
        "bloom",
        bloom_settings,
        bloom_change,
        lambda config: not config.apply_residual_connection_post_layernorm,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", llama_settings, unchanged, is_plain_llama),
    "qwen3": Architecture("qwen3", llama_settings, unchanged, is_plain_llama),
}
