"""Causal attention within segments of a packed row of documents: memory grows with T times the longest segment.

FlashAttention takes the boundaries as they are, in bfloat16 on a GPU where torch has it for grouped heads. Elsewhere a
mask says the same: no segment is longer than `longest` = L tokens, so the queries of a block of L tokens see keys of
their own block and of the one before, and a mask of L x 2 L for each block says which.

T tokens, H query heads, K key-value heads, h head_dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def flash_attention() -> Callable[..., Tensor] | None:
    """torch's, for segments; None without grouped heads (torch 2.10). Its import takes as long as torch's own."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


class Segments(NamedTuple):
    """Which tokens of one row belong together."""

    boundaries: Tensor
    """(n,) int32, rising: where segments start, and then T, as often as fills the tensor (cu_seqlens of
    FlashAttention)."""
    longest: int
    """No segment has more tokens than this."""
    mask: Tensor | None
    """(blocks, L, 2 L): which keys a query may see; None for FlashAttention."""

    @classmethod
    def of(cls, boundaries: Tensor, length: int, longest: int, dtype: torch.dtype = torch.float32) -> Segments:
        """Of a row of `length` tokens, for q, k and v in `dtype` and the attention backend that is enabled now."""
        half = dtype in (torch.bfloat16, torch.float16)
        if boundaries.is_cuda and half and torch.backends.cuda.flash_sdp_enabled() and flash_attention():
            return cls(boundaries, longest, None)
        size = min(longest, length)
        positions = torch.arange(-(-length // size) * size, device=boundaries.device, dtype=boundaries.dtype)
        number = torch.searchsorted(boundaries, positions, right=True).unflatten(0, (-1, size))
        keys = _with_block_before(number, -1)
        position = torch.arange(2 * size, device=boundaries.device)
        mask = (number[..., None] == keys[:, None]) & (position <= position[:size, None] + size)
        return cls(boundaries, longest, mask)


def attend_within(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(q kᵀ / √h) v over the token itself and those before it in its segment: q (1, H, T, h), k and v
    (1, K, T, h) -> (1, H, T, h)."""
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, heads, h), as the model makes them
    if segments.mask is None:
        at, most = segments.boundaries, segments.longest
        y = flash_attention()(q, k, v, at, at, most, most, window_size=(-1, 0), enable_gqa=True)
        return y.transpose(0, 1)[None]
    length, (blocks, size, _) = len(q), segments.mask.shape
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, blocks * size - length)).unflatten(0, (blocks, size)) for t in (q, k, v))
    k, v = (_with_block_before(t, 0) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=segments.mask[:, None], enable_gqa=True)
    return y.transpose(1, 2).flatten(0, 1)[:length].transpose(0, 1)[None]


def _with_block_before(x: Tensor, fill: int) -> Tensor:
    """x (blocks, L, ...) -> (blocks, 2 L, ...): each block after the one before it, the first after `fill`."""
    before = torch.cat((torch.full_like(x[:1], fill), x[:-1]))
    return torch.cat((before, x), dim=1)
