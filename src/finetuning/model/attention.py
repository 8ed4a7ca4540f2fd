"""Attention over packed examples: each sees itself and nothing else, at the cost of the examples, not of their square.

A packed batch is one row of T tokens. The attention that transformers would use builds one (T, T) mask for it; here the
examples are attended to one by one (CPU), as padded rows (GPU), or by a variable-length kernel (GPUs with
FlashAttention). Idea and proof of exactness: attention is a function of an example's own queries, keys and values.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from finetuning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NAME, EAGER = "packed", "packed_eager"  # our names among transformers' attention implementations


WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
)  # settings of a config by which a token sees the nearest ones only


KEPT = 8  # logits of an example that are compared, its last ones: over a large vocabulary all of them would not fit


@dataclass(frozen=True)
class Packing:
    """How examples lie in one row of tokens."""

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def one_by_one(self) -> bool:
        """Whether examples are attended to one after another: a GPU would rather have padded rows."""
        return self.device.type == "cpu"

    @property
    def bounds(self) -> Iterator[tuple[int, int]]:
        ends = list(accumulate(self.lengths))
        return zip([0, *ends[:-1]], ends, strict=True)

    @cached_property
    def borders(self) -> torch.Tensor:
        """(examples + 1,) int32: where each example starts, and the end."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(
            self.device, non_blocking=True
        )

    @cached_property
    def rows(self) -> torch.Tensor:
        """(examples, longest): flat position of every token of an example; behind its end, of its last one."""
        lengths = torch.tensor(self.lengths)[:, None]
        ends = lengths.cumsum(0)
        rows = torch.minimum(ends - lengths + torch.arange(self.longest), ends - 1)
        return rows.to(self.device, non_blocking=True)

    @cached_property
    def back(self) -> torch.Tensor:
        """(T,): position of every token in the flattened `rows`."""
        lengths = torch.tensor(self.lengths)
        total = sum(self.lengths)
        padding = torch.arange(len(lengths)) * self.longest - (
            lengths.cumsum(0) - lengths
        )  # in front of each example
        before = padding.repeat_interleave(lengths, output_size=total)
        return (torch.arange(total) + before).to(self.device, non_blocking=True)

    @cached_property
    def masks(self) -> dict[tuple[int | None, torch.dtype], torch.Tensor]:
        """By window and number format, as `mask_of` makes them: one for all layers, which keep it for backward."""
        return {}


class Current:
    """The packing of the batch that is being computed; None for rows that are each one sequence.

    BLOOM's forward drops every argument it does not know, so the packing cannot travel with the batch.
    """

    packing: Packing | None = None


@contextmanager
def packed_as(packing: Packing | None) -> Iterator[None]:
    """Within, models attend as the packing says. To be held until backward is done: checkpointing attends again."""
    before, Current.packing = Current.packing, packing
    try:
        yield
    finally:
        Current.packing = before


@torch.no_grad()
def require_isolation(model: "PreTrainedModel", longest: int = 0, is_half: bool = False) -> None:
    """Raises UserError if packed examples do not get the logits that they get alone, in this very model.

    Asks it two examples, packed and alone. The first outgrows the model's window if the data's `longest` example does.
    `is_half` says that the model computes in a half-precision format, by autocast or its own.
    """
    config = model.config.get_text_config()
    window = min(getattr(config, name, None) or longest for name in WINDOWS)
    lengths = (min(longest, window + KEPT) if longest > window else 5, KEPT)
    tokens = torch.randint(5, 13, (1, sum(lengths)), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    was_training = model.training
    model.eval()
    try:
        apart = torch.cat(
            [last_logits(model, part, part.shape[1:]) for part in tokens.split(lengths, dim=1)],
            dim=1,
        )
        with packed_as(Packing(lengths, model.device)):
            together = last_logits(model, tokens, lengths)
    finally:
        model.train(was_training)
    difference, size = (apart - together).norm(), apart.norm()
    if not difference <= tolerance(model, is_half) * size:
        raise UserError(
            f"data.layout: packed, but in this {model.config.model_type} model packed examples do not get the logits "
            f"that they get alone (they differ by {difference / size:.1%}); use data.layout=padded"
        )


def tolerance(model: "PreTrainedModel", is_half: bool) -> float:
    """How far the logits may be apart, as a share of their norm.

    Measured, with up to 24 layers: rounding makes 1e-6, in half precision 0.01, and in 8 bits, where it depends on what
    else is in the batch, 0.07. A leak makes 0.08 in a BLOOM with random weights, 0.5 and more with larger ones.
    """
    if getattr(model, "is_quantized", False):
        return 0.2
    return 0.05 if is_half or model.dtype != torch.float32 else 1e-3


def last_logits(
    model: "PreTrainedModel", input_ids: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """(1, at most KEPT for each of the examples in the row, V)"""
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(input_ids.device)
    kept = KEPT * len(lengths)
    output = model(
        input_ids=input_ids, position_ids=positions, use_cache=False, logits_to_keep=kept
    )
    return output.logits[:, -kept:].float()


def isolate(model: "PreTrainedModel") -> None:
    """Has the model attend by `packed_as`; outside of it nothing changes, generation included.

    Raises UserError for a model whose attention is more than SDPA's, which ours would leave out without a word.
    """
    own = model.config._attn_implementation
    if model.config.model_type == "bloom":
        for block in model.transformer.h:
            attention = block.self_attention
            attention.forward = types.MethodType(attend_bloom, attention)
        model.config._attn_implementation = EAGER
    elif own != "sdpa":
        raise UserError(
            f"data.layout: packed, but {model.config.model_type} models attend in a way of their own ({own} attention: "
            "sinks or capped scores, say), which is not there for packed examples; use data.layout=padded"
        )
    else:
        model.set_attn_implementation(NAME)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scale: float | None,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each example. query (1, H, T, D), key and value (1, H or fewer, T, D) -> (1, H, T, D).

    `bias` (H, 1, longest or more), the same in every layer, is added to the scores of an example's first, second, ...
    key. With `window` a query sees so many keys at most, the last of them its own.
    """
    query, key, value = map(in_autocast, (query, key, value))
    if window and window >= packing.longest:
        window = None
    if bias is None and dropout == 0 and has_flash(query):
        return attend_flash(query, key, value, packing, scale, window)
    mask = mask_of(packing, query, bias, window)
    gqa = key.shape[1] != query.shape[1]
    settings = {"scale": scale, "dropout_p": dropout, "is_causal": mask is None, "enable_gqa": gqa}
    if packing.one_by_one:
        parts = []
        for start, end in packing.bounds:
            cut = None if mask is None else mask[:, :, : end - start, : end - start]
            q, k, v = (part[:, :, start:end] for part in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=cut, **settings))
        return torch.cat(parts, dim=2)
    q, k, v = (
        part[0].transpose(0, 1)[packing.rows].transpose(1, 2) for part in (query, key, value)
    )
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)
    return output.transpose(1, 2).flatten(0, 1)[packing.back].transpose(0, 1)[None]


def in_autocast(part: torch.Tensor) -> torch.Tensor:
    """In autocast's format, where it is on.

    SDPA makes it so itself, the kernel does not: rotary positions leave float32 queries and keys, beside half values.
    """
    device = part.device.type
    return part.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else part


def attend_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    border, longest = packing.borders, packing.longest
    settings = {
        "window_size": (window - 1 if window else -1, 0),
        "enable_gqa": key.shape[1] != query.shape[1],
    }
    output = varlen_attn(q, k, v, border, border, longest, longest, scale=scale, **settings)
    return output.transpose(0, 1)[None]


def has_flash(query: torch.Tensor) -> bool:
    """Whether torch's variable-length FlashAttention takes these: half precision on compute capability 8.0 and up."""
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and is_half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def mask_of(
    packing: Packing, query: torch.Tensor, bias: torch.Tensor | None, window: int | None
) -> torch.Tensor | None:
    """(1, H or 1, longest, longest) in the query's format; None where it is enough to be causal."""
    if bias is None and window is None:
        return None
    kind = (window, query.dtype)
    if kind not in packing.masks:
        bias = query.new_zeros(1, 1, packing.longest) if bias is None else bias.to(query.dtype)
        packing.masks[kind] = causal(bias, packing.longest, window)
    return packing.masks[kind]


def causal(bias: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """(1, H, length, length): the bias where a query sees its key, minus infinity where not: later, or too far back."""
    everywhere = torch.ones(length, length, dtype=torch.bool, device=bias.device)
    unseen = everywhere.triu(1)
    if window:
        unseen |= everywhere.tril(-window)
    return bias[:, :, :length].expand(-1, length, -1).masked_fill(unseen, float("-inf"))[None]


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
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    output = attend(query, key, value, Current.packing, scaling, dropout, window=sliding_window)
    return output.transpose(1, 2).contiguous(), None


def unless_packed(mask: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """A mask function of transformers' AttentionMaskInterface: none for a packed batch, else that of `mask`."""
    return lambda *args, **kwargs: mask(*args, **kwargs) if Current.packing is None else None


AttentionInterface.register(NAME, packed_attention)


AttentionMaskInterface.register(NAME, unless_packed(sdpa_mask))


AttentionMaskInterface.register(EAGER, unless_packed(eager_mask))


def attend_bloom(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' BloomAttention.forward, for a packed batch.

    BLOOM ignores position_ids. Its bias, alibi, grows with the distance of a key alone (softmax does not see a constant
    added to a query's scores), so that examples need to be kept apart, but not to start at position 0.
    """
    if Current.packing is None:
        return type(self).forward(self, hidden_states, residual, alibi, *args, **kwargs)
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    dropout = self.attention_dropout.p if self.training else 0.0
    context = attend(query, key, value, Current.packing, self.inv_norm_factor, dropout, bias=alibi)
    output = self.dense(context.transpose(1, 2).flatten(2))
    return F.dropout(output, self.hidden_dropout, self.training) + residual, None
