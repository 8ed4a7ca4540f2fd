"""Attention over packed examples: each attends to itself only, at the cost of the examples alone.

A packed batch is one row of T tokens. transformers would build one (T, T) mask for it; here the
examples are attended to one by one (CPU), as padded rows (GPU), or by a variable-length kernel
(GPUs with FlashAttention). That is exact: an example's attention is a function of its own queries,
keys and values. How models come to attend so is said in packed_models.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from finetuning.model.packing import Packing
from finetuning.model.padded_rows import pad, unpad
from finetuning.model.recompute import made_by

# Not torch.nn.attention.varlen.varlen_attn: it calls this, but always without dropout.
flash_attention: Any = torch.ops.aten._flash_attention_forward


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
    key, value = map(packing.attended, (key, value))
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
    q = pad(query, packing.rows, packing)
    k, v = (pad(x, packing.key_rows, packing) for x in (key, value))
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
    if packing.keys is not None:
        # SDPA's own causal mask has the first query look at the first key alone.
        window = window or packing.longest
    mask = mask_of(packing, packing.longest, query, bias, window)
    gqa = key.shape[1] != query.shape[1]
    parts = []
    for q, k, v, cut in by_example(query, key, value, packing, mask):
        part = F.scaled_dot_product_attention(
            q, k, v, cut, dropout, is_causal=cut is None, scale=scale, enable_gqa=gqa
        )
        parts.append(part.transpose(1, 2))
    return join(*parts).transpose(1, 2)


def by_example(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    mask: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(query, key, value, mask) of each example, whose last query is the token of its last key."""
    # Not slices: the backward of each would be a row of zeros as long as the whole batch.
    queries = query.split_with_sizes(packing.lengths, dim=2)
    keys, values = (x.split_with_sizes(packing.key_lengths, dim=2) for x in (key, value))
    for q, k, v in zip(queries, keys, values, strict=True):
        end = k.shape[2]
        cut = None if mask is None else mask[:, :, end - q.shape[2] : end, :end]
        yield q, k, v, cut


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
    # With fewer queries than keys, its causal mask has the last query look at every key.
    longest = max(packing.lengths), packing.longest
    sequences = (packing.boundaries, packing.key_boundaries, *longest)
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
