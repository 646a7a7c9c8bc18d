"""Causal attention within segments of a packed row of documents: memory grows with T times the longest segment.

No segment is longer than `longest` = L tokens. So the queries of a block of L tokens see keys of their own block and of
the one before, and a mask of L x 2 L says which. Every shape is static.

B rows, T tokens, H query heads, K key-value heads, h head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segments(NamedTuple):
    """Which tokens belong together."""

    number: Tensor
    """(B, T): the number of each token's segment in its row."""
    longest: int
    """No segment has more tokens than this."""

    @classmethod
    def of(cls, boundaries: Tensor, length: int, longest: int) -> Segments:
        """Of one row of `length` tokens. `boundaries`, (n,) int32, rise: where segments start, and then `length`, as
        often as fills the tensor (cu_seqlens of FlashAttention)."""
        positions = torch.arange(length, device=boundaries.device, dtype=boundaries.dtype)
        return cls(torch.searchsorted(boundaries, positions, right=True)[None], longest)


def attend_within(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(q kᵀ / √h) v over the token itself and those before it in its segment: q (B, H, T, h), k and v
    (B, K, T, h) -> (B, H, T, h)."""
    number, size = segments.number, min(segments.longest, q.size(2))
    length = q.size(2)
    blocks = -(-length // size)
    padding = blocks * size - length
    q, k, v = (F.pad(t, (0, 0, 0, padding)) for t in (q, k, v))
    number = F.pad(number, (0, padding), value=-1)
    query_numbers = number.unflatten(1, (blocks, size))  # (B, blocks, size)
    key_numbers = _with_block_before(query_numbers, -2)
    position = torch.arange(2 * size, device=q.device)
    mask = (query_numbers[..., None] == key_numbers[:, :, None]) & (position <= position[:size, None] + size)
    q, k, v = (t.unflatten(2, (blocks, size)).transpose(1, 2) for t in (q, k, v))  # (B, blocks, heads, size, h)
    k, v = (_with_block_before(t.transpose(2, 3), 0).transpose(2, 3) for t in (k, v))
    y = F.scaled_dot_product_attention(
        *(t.flatten(0, 1) for t in (q, k, v)), attn_mask=mask.flatten(0, 1)[:, None], enable_gqa=True
    )
    return y.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _with_block_before(x: Tensor, fill: int) -> Tensor:
    """x (B, blocks, size, ...) -> (B, blocks, 2 size, ...): each block after the one before it, the first after
    `fill`."""
    before = torch.cat((torch.full_like(x[:, :1], fill), x[:, :-1]), dim=1)
    return torch.cat((before, x), dim=2)
