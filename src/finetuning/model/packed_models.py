"""How the models of transformers come to attend to packed examples: by its registries.

Importing this module registers our attention there, and mends three functions of theirs; for a
batch that is not packed they do what they did.
"""

import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations import sdpa_attention

from finetuning.errors import UserError
from finetuning.model.attention import attend, by_example, has_flash, mask_of
from finetuning.model.packing import Current

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED, PACKED_EAGER = "packed", "packed_eager"  # our names in transformers' attention registry
CAPPED = ("gemma2", "gemma2_text")  # models that cap their attention's scores, without SDPA


def use_packed_attention(model: "PreTrainedModel") -> None:
    """Has the model attend as `packed_as` says; outside of it nothing changes.

    Raises UserError for a model whose attention is more than SDPA's, which ours would silently
    leave out.
    """
    kind, implementation = model.config.model_type, model.config._attn_implementation
    if kind == "bloom":
        blocks: Any = model.transformer
        for block in blocks.h:
            block.self_attention.forward = types.MethodType(attend_bloom, block.self_attention)
        model.config._attn_implementation = PACKED_EAGER
    elif kind in CAPPED:
        model.set_attn_implementation(PACKED_EAGER)
    elif implementation != "sdpa":
        raise UserError(
            f"data.layout: packed, but {kind} models have an attention ({implementation}: sinks or "
            "capped scores, say) that is not implemented for packed examples; use "
            "data.layout=padded"
        )
    else:
        model.set_attn_implementation(PACKED)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention of transformers' AttentionInterface: (1, H, T, D) -> (1, T, H, D)."""
    if Current.packing is None:
        return sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    output = attend(query, key, value, Current.packing, scaling, dropout, window=sliding_window)
    return output.transpose(1, 2).contiguous(), None


def packed_capped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of CAPPED models, as transformers computes it for padded rows."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if Current.packing is None:
        settings = {"scaling": scaling, "dropout": dropout, "softcap": softcap, **kwargs}
        padded: tuple[torch.Tensor, torch.Tensor | None] = eager(
            module, query, key, value, attention_mask, **settings
        )
        return padded
    packing, parts = Current.packing, []
    mask = mask_of(packing, packing.longest, query, None, sliding_window or packing.longest)
    assert mask is not None
    key, value = map(packing.attended, (key, value))
    for q, k, v, cut in by_example(query, key, value, packing, mask):
        settings = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
        parts.append(eager(module, q, k, v, cut, **settings)[0])  # (1, T of it, H, D)
    return torch.cat(parts, dim=1), None


def unless_packed(mask: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """A function of transformers that makes a mask: none for a packed batch."""
    return lambda *args, **kwargs: mask(*args, **kwargs) if Current.packing is None else None


def unless_known(find: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """transformers' search for positions that restart, which asks the device in every step."""
    return lambda position_ids: None if Current.is_known else find(position_ids)


def where_a_kernel_takes_it(use_gqa: Callable[..., bool]) -> Callable[..., bool]:
    """Whether transformers hands SDPA fewer heads of keys than of queries.

    On a GPU only FlashAttention takes them, that is half precision and compute capability 8.0.
    Elsewhere the math kernel does, in float32 and with all scores kept: 16,242 MiB for four
    examples of a 1B Llama on a T4, 7,937 with the keys repeated.
    """

    def use(mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> bool:
        return use_gqa(mask, key, value) and (not key.is_cuda or has_flash(key, value))

    return use


def attend_bloom(
    self: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' BloomAttention.forward, for a packed batch.

    BLOOM ignores position_ids. Its bias, ALiBi, grows with the distance of a key alone (softmax is
    the same for scores that are all larger by a constant), so that examples need to be kept apart,
    but not to start at position 0.
    """
    if Current.packing is None:
        output: tuple[torch.Tensor, torch.Tensor | None] = type(self).forward(
            self, hidden_states, residual, alibi, *args, **kwargs
        )
        return output
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    dropout = self.attention_dropout.p if self.training else 0.0
    context = attend(query, key, value, Current.packing, self.inv_norm_factor, dropout, bias=alibi)
    projected = self.dense(context.transpose(1, 2).flatten(2))
    return F.dropout(projected, self.hidden_dropout, self.training) + residual, None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, unless_packed(masking_utils.sdpa_mask))
AttentionInterface.register(PACKED_EAGER, packed_capped_attention)
AttentionMaskInterface.register(PACKED_EAGER, unless_packed(masking_utils.eager_mask))
masking_utils.find_packed_sequence_indices = unless_known(
    masking_utils.find_packed_sequence_indices
)
sdpa_attention.use_gqa_in_sdpa = where_a_kernel_takes_it(sdpa_attention.use_gqa_in_sdpa)
