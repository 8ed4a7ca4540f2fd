"""Attention over packed examples: each attends to itself only, at the cost of the examples alone.

A packed batch is one row of T tokens. transformers would build one (T, T) mask for it; here the
examples are attended to one by one (CPU), as padded rows (GPU), or by a variable-length kernel
(GPUs with FlashAttention). That is exact: an example's attention is a function of its own queries,
keys and values.
"""

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations import sdpa_attention

from finetuning.errors import UserError
from finetuning.model.recompute import made_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED, PACKED_EAGER = "packed", "packed_eager"  # our names in transformers' attention registry
CAPPED = ("gemma2", "gemma2_text")  # models that cap their attention's scores, without SDPA
# Fields of a config by which a token attends to the nearest tokens only.
WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")
# Not torch.nn.attention.varlen.varlen_attn: it calls this, but always without dropout.
flash_attention: Any = torch.ops.aten._flash_attention_forward
# Logits of an example that the isolation check compares, its last ones: with a large vocabulary
# those of all tokens would not fit.
COMPARED = 8


@dataclass(frozen=True)
class Packing:
    """How examples lie in one row of tokens.

    What depends on it is computed where the positions are: a copy of it would wait for the device.
    """

    lengths: tuple[int, ...]
    position_ids: torch.Tensor
    """(1, T), of every token in its example"""

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def one_by_one(self) -> bool:
        """Whether examples are attended to one after another; a GPU is faster on padded rows."""
        return self.position_ids.device.type == "cpu"

    @property
    def row_length(self) -> int:
        """Of padded rows: a kernel copies a mask, in every layer, whose rows are not aligned."""
        return -(-self.longest // 16) * 16

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """(examples + 1,) int32: where each example starts, and the end (`cu_seqlens`)."""
        is_start = self.position_ids[0] == 0
        starts = torch.nonzero_static(is_start, size=len(self.lengths))[:, 0]
        return F.pad(starts, (0, 1), value=len(is_start)).int()

    @cached_property
    def rows(self) -> torch.Tensor:
        """(T,): where every token is in the flattened padded rows."""
        positions = self.position_ids[0]
        example = (positions == 0).cumsum(0) - 1
        return example * self.row_length + positions

    @cached_property
    def masks(self) -> dict[tuple[int | None, torch.dtype], torch.Tensor]:
        """By window and number format: one mask for all layers, which keep it for backward."""
        return {}


class Current:
    """The packing of the batch that is being computed; None where each row is one sequence.

    A global, because BLOOM's forward drops every argument that it does not know: the packing cannot
    travel with the batch.
    """

    packing: Packing | None = None
    is_known = False
    """whether it was said, be it that there is none"""


@contextmanager
def packed_as(packing: Packing | None) -> Iterator[None]:
    """Within, models attend by this packing.

    Must last until backward is done: activation checkpointing attends again there.
    """
    before = Current.packing, Current.is_known
    Current.packing, Current.is_known = packing, True
    try:
        yield
    finally:
        Current.packing, Current.is_known = before


@torch.no_grad()
def require_isolation(
    model: "PreTrainedModel",
    longest: int = 0,
    is_half: bool = False,
    device: torch.device | None = None,
) -> None:
    """Raises UserError if packed examples do not get the logits that they get alone.

    Computes two examples with this very model, packed and alone. The first is longer than the
    model's window if the data's `longest` example is. `is_half`: the model computes in half
    precision, by autocast or its own number format. `device`: what it computes on, where its
    weights lie elsewhere in between (FSDP2 with offload).
    """
    config = model.config.get_text_config()
    window = min(getattr(config, name, None) or longest for name in WINDOW_FIELDS)
    lengths = (min(longest, window + COMPARED) if longest > window else 5, COMPARED)
    random = torch.Generator().manual_seed(0)
    device = device or model.device
    tokens = torch.randint(5, 13, (1, sum(lengths)), generator=random).to(device)
    was_training = model.training
    model.train(False)
    try:
        parts = tokens.split_with_sizes(lengths, dim=1)
        alone = torch.cat([last_logits(model, part, part.shape[1:]) for part in parts], dim=1)
        with packed_as(Packing(lengths, positions_of(lengths, device))):
            packed = last_logits(model, tokens, lengths)
    finally:
        model.train(was_training)
    difference, norm = (alone - packed).norm(), alone.norm()
    if not difference <= tolerance(model, is_half) * norm:
        raise UserError(
            f"data.layout: packed, but in this {model.config.model_type} model packed examples do "
            f"not get the logits that they get alone (they differ by {difference / norm:.1%}); "
            "use data.layout=padded"
        )


def tolerance(model: "PreTrainedModel", is_half: bool) -> float:
    """How far the logits may be apart, as a share of their norm.

    Measured, with up to 24 layers: rounding makes 1e-6, in half precision 0.01, and in 8 bits,
    where it depends on what else is in the batch, 0.07. A leak makes 0.08 in a BLOOM with random
    weights, 0.5 and more with larger ones.
    """
    if getattr(model, "is_quantized", False):
        return 0.2
    return 0.05 if is_half or model.dtype != torch.float32 else 1e-3


def last_logits(
    model: "PreTrainedModel", input_ids: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """(1, at most COMPARED for each of the examples in the row, V)"""
    positions = positions_of(lengths, input_ids.device)
    kept = COMPARED * len(lengths)
    output = model(
        input_ids=input_ids, position_ids=positions, use_cache=False, logits_to_keep=kept
    )
    logits: torch.Tensor = output.logits
    return logits[:, -kept:].float()


def positions_of(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """(1, T) position_ids of examples in one row."""
    return torch.cat([torch.arange(length) for length in lengths])[None].to(device)


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
            f"data.layout: packed, but {kind} models attend in a way of their own "
            f"({implementation} attention: sinks or capped scores, say), which is not there for "
            "packed examples; use data.layout=padded"
        )
    else:
        model.set_attn_implementation(PACKED)


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
    """Causal attention within each example.

    query (1, H, T, D), key and value (1, H or fewer, T, D) -> (1, H, T, D). `bias` (H, 1, longest
    or more), the same in every layer, is added to the scores of an example's first, second, ...
    key. With `window` a query attends to that many keys at most, the last of them its own.
    """
    query, key, value = map(to_autocast_dtype, (query, key, value))
    if window and window >= packing.longest:
        window = None
    if bias is None and has_flash(query, value):
        return attend_flash(query, key, value, packing, scale, dropout, window)
    if packing.one_by_one:
        return attend_one_by_one(query, key, value, packing, scale, dropout, bias, window)
    # No kernel of a GPU takes fewer heads of keys than of queries together with a mask, and before
    # compute capability 8.0 none does at all.
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mask = mask_of(packing, packing.row_length, query, bias, window)
    q, k, v = (pad(x, packing) for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, scale=scale
    )
    return unpad(output, packing)


def attend_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scale: float | None,
    dropout: float,
    bias: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """`attend` for a CPU, whose time for padding would be lost."""
    mask, gqa = (
        mask_of(packing, packing.longest, query, bias, window),
        key.shape[1] != query.shape[1],
    )
    parts = []
    # Not slices: the backward of each would be a row of zeros as long as the whole batch.
    splits = (x.split_with_sizes(packing.lengths, dim=2) for x in (query, key, value))
    for q, k, v in zip(*splits, strict=True):
        cut = None if mask is None else mask[:, :, : q.shape[2], : q.shape[2]]
        part = F.scaled_dot_product_attention(
            q, k, v, cut, dropout, is_causal=cut is None, scale=scale, enable_gqa=gqa
        )
        parts.append(part.transpose(1, 2))
    return join(*parts).transpose(1, 2)


class Scatter(torch.autograd.Function):
    """(T, ...) -> (size, ...): each row where the index says, zeros elsewhere.

    It and Gather are each other's backward: no place is taken twice. Autograd knows neither; that
    of x[index] sorts the index, in every layer, for q, k and v.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
        ctx.index = index
        whole: torch.Tensor = rows.new_zeros(size, *rows.shape[1:])
        return whole.index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        return grads[0].index_select(0, ctx.index), None, None


class Gather(torch.autograd.Function):
    """(size, ...) -> (T, ...): the rows that the index names."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.index, ctx.size = index, len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        whole: torch.Tensor = grad.new_zeros(ctx.size, *grad.shape[1:])
        return whole.index_copy_(0, ctx.index, grad), None


scatter: Callable[..., torch.Tensor] = Scatter.apply
gather: Callable[..., torch.Tensor] = Gather.apply


def pad(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(1, H, T, D) -> (examples, H, row_length, D), zero behind an example's end."""
    count, length = len(packing.lengths), packing.row_length
    rows = scatter(packed[0].transpose(0, 1), packing.rows, count * length)
    return rows.view(count, length, *rows.shape[1:]).transpose(1, 2)


def unpad(rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(examples, H, row_length, D) -> (1, H, T, D)"""
    packed = gather(rows.transpose(1, 2).flatten(0, 1), packing.rows)
    return packed.transpose(0, 1)[None]


def join(*parts: torch.Tensor) -> torch.Tensor:
    """(1, T of each, H, D) -> (1, T, H, D). SDPA keeps the parts, so that the whole need not be."""
    whole = torch.cat(parts, dim=1)
    made_by(lambda *kept: torch.cat(kept, dim=1), whole, *parts)
    return whole


def to_autocast_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """In autocast's format, where it is on.

    SDPA casts by itself, the variable-length kernel does not: rotary positions leave float32
    queries and keys beside half-precision values.
    """
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def attend_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """`attend` by FlashAttention's kernel for sequences of different lengths."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    sequences = (packing.boundaries, packing.boundaries, packing.longest, packing.longest)
    left = window - 1 if window else -1
    settings = {"scale": scale, "window_size_left": left, "window_size_right": 0}
    output = flash_attention(q, k, v, *sequences, dropout, window is None, False, **settings)
    attended: torch.Tensor = output[0].transpose(0, 1)[None]
    return attended


def has_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the variable-length kernel takes these.

    It wants half precision, compute capability 8.0, and heads of one size, at most 256 numbers and
    a multiple of 8: not OpenLLaMA-3B's 100, nor DeepSeek's 192 for keys and 128 for values.
    """
    size = query.shape[-1]
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    fits = is_half and size == value.shape[-1] and size <= 256 and size % 8 == 0
    return query.is_cuda and fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def mask_of(
    packing: Packing,
    length: int,
    query: torch.Tensor,
    bias: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor | None:
    """(1, H or 1, length, length) in the query's format; None where causal is all it must be."""
    if bias is None and window is None:
        return None
    kind = (window, query.dtype)
    if kind not in packing.masks:
        bias = query.new_zeros(1, 1, length) if bias is None else bias.to(query.dtype)
        # Rows may be longer than the batch that the bias was made for; what they add is hidden.
        bias = F.pad(bias, (0, max(0, length - bias.shape[-1])))
        packing.masks[kind] = causal_mask(bias, length, window)
    return packing.masks[kind]


def causal_mask(bias: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """(1, H, length, length): the bias of each key; minus infinity where a query must not look.

    That is at later keys and at those further back than the window.
    """
    everywhere = torch.ones(length, length, dtype=torch.bool, device=bias.device)
    hidden = everywhere.triu(1)
    if window:
        hidden |= everywhere.tril(-window)
    return bias[:, :, :length].expand(-1, length, -1).masked_fill(hidden, float("-inf"))[None]


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
    splits = (x.split_with_sizes(packing.lengths, dim=2) for x in (query, key, value))
    for q, k, v in zip(*splits, strict=True):
        cut = mask[:, :, : q.shape[2], : q.shape[2]]
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


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, unless_packed(masking_utils.sdpa_mask))
AttentionInterface.register(PACKED_EAGER, packed_capped_attention)
AttentionMaskInterface.register(PACKED_EAGER, unless_packed(masking_utils.eager_mask))
masking_utils.find_packed_sequence_indices = unless_known(
    masking_utils.find_packed_sequence_indices
)
sdpa_attention.use_gqa_in_sdpa = where_a_kernel_takes_it(sdpa_attention.use_gqa_in_sdpa)
# torch prefers cuDNN's attention on an H100: half a second for every new length, and wrong answers
# and gradients in half precision (pytorch#193893, pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)


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
