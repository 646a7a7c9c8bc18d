"""A layer: attention, then the MLP, on the residual stream. `linear` and `mlp` multiply by its matrices.

    x = x + attention(norm(x))
    x = x + relu(norm(x) w_fcᵀ)² w_projᵀ

Shapes: B sequences, T tokens, D model_dim, H query heads, K key-value heads, h head_dim. Norms have no weight and
return the dtype of their input (torch >= 2.12 puts rms_norm on autocast's float32 list; nothing here runs under
autocast). The published scales of both outputs, attn_scale and mlp_scale, are in the matrices (`GPT.weights`).
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
from golfgpt.model.rotary import norm_rotate


def mlp(x: Tensor, w_fc: Weight, w_proj: Weight) -> Tensor:
    """relu(x w_fcᵀ)² w_projᵀ, (..., D) -> (..., D). For plain matrices it is one fused op."""
    if isinstance(w_fc, Tensor) and isinstance(w_proj, Tensor):
        return relu2_mlp(x, w_fc, w_proj)
    return linear(linear(x, w_fc).relu().square(), w_proj)


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


def project(x: Tensor, head_dim: int, *matrices: Weight) -> Tensor:
    """x (B, T, D) times each matrix (heads * h, D), one after another: (B, T, all heads, h). Plain matrices are
    multiplied in one product, which reads x once; for a single token, copying them would cost more than it saves."""
    if x.size(1) > 1 and all(isinstance(w, Tensor) for w in matrices):
        product = F.linear(x, torch.cat(matrices))
    else:
        product = torch.cat([linear(x, w) for w in matrices], dim=-1)
    return product.unflatten(-1, (-1, head_dim))


def attention(
    n: Tensor, w: Mapping[str, Weight], index: int, tokens: Tokens, last: tuple[int, Tensor] | None = None
) -> Tensor:
    """Output (B, T, D) for the normalized input n (B, T, D). Queries attend to these tokens, and with a cache to those
    that it holds for layer `index` of the plan. `last` as in `layer`.

    Heads stay in the layout (B, T, heads, h) of the product up to the attention itself, which takes and returns any
    strides: in (B, heads, T, h), norm, rotation and gain would read and write copies."""
    head_dim, gain = 2 * tokens.cos.size(-1), w["q_gain"]
    num_heads, queries = len(gain), tokens
    if last is None:
        x = project(n, head_dim, w["c_q"], w["c_k"], w["c_v"])
        kv_heads = (x.size(2) - num_heads) // 2
        qk, v = x.split((num_heads + kv_heads, kv_heads), dim=2)
        q, k = norm_rotate(qk, tokens.cos, tokens.sin, gain).split((num_heads, kv_heads), dim=2)
    else:
        queries = tokens.last(*last)
        k, v = project(n, head_dim, w["c_k"], w["c_v"]).chunk(2, dim=2)
        k = norm_rotate(k, tokens.cos, tokens.sin, gain[:0])
        q = norm_rotate(project(n[:, -last[0] :], head_dim, w["c_q"]), queries.cos, queries.sin, gain)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    if tokens.cache is not None:
        k, v = tokens.cache.extend(index, k, v)
    causal = queries.mask is None and not queries.past
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=queries.mask, is_causal=causal, enable_gqa=True)
    return linear(y.transpose(1, 2).flatten(2), w["attn_proj"])


def layer(
    x: Tensor, w: Mapping[str, Weight], index: int, tokens: Tokens, last: tuple[int, Tensor] | None = None
) -> Tensor:
    """The residual stream (B, T, D) after a layer. `w` holds its weights by parameter name. With `last` = (count,
    mask), the result has only the last `count` tokens, (B, count, D); the other tokens only provide keys and values."""
    attended = attention(rms_norm(x), w, index, tokens, last)
    if last is not None:
        x = x[:, -last[0] :]
    x = x + attended
    return x + mlp(rms_norm(x), w["mlp_fc"], w["mlp_proj"])
