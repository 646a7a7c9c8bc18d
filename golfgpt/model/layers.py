"""A layer: attention, then the MLP, on the residual stream. `linear` and `mlp` multiply by its matrices.

    x = x + attn_scale * attention(norm(x))
    x = x + mlp_scale * relu(norm(x) w_fcᵀ)² w_projᵀ

Shapes: B sequences, T tokens, D model_dim, H query heads, K key-value heads, h head_dim. Norms have no weight and
return the dtype of their input (torch >= 2.12 puts rms_norm on autocast's float32 list; nothing here runs under
autocast). NTK-aware scaling of the rotary base is from bloc97's note of 2023 on the context length of LLaMA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from golfgpt_kernels import relu2_mlp
from torch import Tensor

from golfgpt.model.kv_cache import KVCache
from golfgpt.model.linear import Weight, linear, rms_norm


def mlp(x: Tensor, w_fc: Weight, w_proj: Weight) -> Tensor:
    """relu(x w_fcᵀ)² w_projᵀ, (..., D) -> (..., D). For plain matrices it is one fused op."""
    if isinstance(w_fc, Tensor) and isinstance(w_proj, Tensor):
        return relu2_mlp(x, w_fc, w_proj)
    return linear(linear(x, w_fc).relu().square(), w_proj)


def rope_table(start: int, length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, head_dim / 2) in float32, for the positions start to start + length - 1."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., T, head_dim) by minus the angles of the table; element i is paired with i + head_dim / 2."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def visible(ids: Tensor, queries: int, document_start: int | None) -> Tensor:
    """Attention mask of the last `queries` tokens of ids (B, T). A token may attend to itself and to earlier tokens;
    with `document_start`, only to those of its own document. Bool (queries, T), or (B, 1, queries, T) with
    `document_start`."""
    position = torch.arange(ids.size(1), device=ids.device)
    mask = position[-queries:, None] >= position
    if document_start is None:
        return mask
    document = (ids == document_start).cumsum(1)
    return mask & (document[:, -queries:, None] == document[:, None, :])[:, None]


class Tokens(NamedTuple):
    """What attention needs to know about the tokens of a forward."""

    cos: Tensor
    sin: Tensor
    """Rotary table (T, h / 2) in the compute dtype."""
    mask: Tensor | None
    """Attention mask from `visible`; None: each token attends to itself and to all earlier tokens."""
    cache: KVCache | None
    past: int
    """Number of tokens in the cache before these."""

    def last(self, count: int, mask: Tensor) -> Tokens:
        """Only the last `count` tokens. They need `mask`, because is_causal aligns the queries with the first keys."""
        return Tokens(self.cos[-count:], self.sin[-count:], mask, self.cache, self.past)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * h) -> (B, heads, T, h)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def keys_and_values(n: Tensor, w: Mapping[str, Weight], index: int, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Keys and values, each (B, K, T, h), of the normalized input n (B, T, D). With a cache, those that it holds for
    layer `index` of the plan come first."""
    head_dim = 2 * tokens.cos.size(-1)
    k, v = (heads(linear(n, w[name]), head_dim) for name in ("c_k", "c_v"))
    k = rotate(rms_norm(k), tokens.cos, tokens.sin)
    return (k, v) if tokens.cache is None else tokens.cache.extend(index, k, v)


def attention(n: Tensor, k: Tensor, v: Tensor, w: Mapping[str, Weight], tokens: Tokens) -> Tensor:
    """Output (B, T, D) for the normalized input n (B, T, D). Its queries attend to k and v (B, K, S, h)."""
    q = heads(linear(n, w["c_q"]), k.size(-1))
    q = rotate(rms_norm(q), tokens.cos, tokens.sin) * w["q_gain"][:, None, None]
    causal = tokens.mask is None and not tokens.past
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=tokens.mask, is_causal=causal, enable_gqa=True)
    return linear(y.transpose(1, 2).flatten(2), w["attn_proj"])


def layer(
    x: Tensor, w: Mapping[str, Weight], index: int, tokens: Tokens, last: tuple[int, Tensor] | None = None
) -> Tensor:
    """The residual stream (B, T, D) after a layer. `w` holds its weights by parameter name. With `last` = (count,
    mask), the result has only the last `count` tokens, (B, count, D); the other tokens only provide keys and values."""
    n = rms_norm(x)
    k, v = keys_and_values(n, w, index, tokens)
    if last is not None:
        count, mask = last
        x, n, tokens = x[:, -count:], n[:, -count:], tokens.last(count, mask)
    x = x + w["attn_scale"] * attention(n, k, v, w, tokens)
    return x + w["mlp_scale"] * mlp(rms_norm(x), w["mlp_fc"], w["mlp_proj"])
