"""A layer: attention, then the MLP, on the residual stream. `linear` and `mlp` multiply by its matrices.

    x = x + skip_weights p, or with skip gates g, g x + (1 - g) skip_weights p      where the plan has a skip from p
    r = resid_mix[0] x + resid_mix[1] x0
    x = r + attention(norm(r));  x = x + leaky_relu(norm(x) w_fcᵀ)² w_projᵀ                      sequential
    x = r + attention(norm(r)) + mlp(norm(r))                                                    one_lane
    x = r + attention(norm(r));  l = l + mlp(norm(l))                                            merged
    a = attention(norm(r));  f = mlp(norm(l));  x = ρ0 x + π00 a + π10 f;  l = ρ1 l + π01 a + π11 f    routed

l is a second lane; where it begins, it equals x, with the skip (merged) or without it (routed). ρ are the layer's
resid_lambdas, π its post_lambdas. Norms are multiplied by the plan's input_scale. Weights may have a path beside each
output: attention(n) + n attn_pathᵀ, and the MLP with mlp_path alike (test-time training of the records).

Shapes: B sequences, T tokens, D model_dim, H query heads, K key-value heads, h head_dim. Norms have no weight and
return the dtype of their input (torch >= 2.12 puts rms_norm on autocast's float32 list; nothing here runs under
autocast). The published scales of both outputs, attn_scale and mlp_scale, are in the matrices (`GPT.weights`).

Sources: the published scripts; parallel residuals of PR #1204, #1477 and the records of 2026-04-09 and 2026-04-10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from golfgpt_kernels import relu2_mlp
from torch import Tensor

from golfgpt.config import ModelConfig
from golfgpt.model.attention_output import exclusive, output_gate
from golfgpt.model.kv_cache import KVCache
from golfgpt.model.linear import Weight, linear, rms_norm, scaled
from golfgpt.model.plan import LayerPlan
from golfgpt.model.rotary import norm_rotate
from golfgpt.model.segments import Segments, attend_within


def mlp(x: Tensor, w_fc: Weight, w_proj: Weight, slope: float = 0.0) -> Tensor:
    """leaky_relu(x w_fcᵀ, slope)² w_projᵀ, (..., D) -> (..., D). For plain matrices it is one fused op."""
    if isinstance(w_fc, Tensor) and isinstance(w_proj, Tensor):
        return relu2_mlp(x, w_fc, w_proj, negative_slope=slope)
    return linear(F.leaky_relu(linear(x, w_fc), slope).square(), w_proj)


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
    """What layers need to know about the tokens of a forward."""

    config: ModelConfig
    cos: Tensor
    sin: Tensor
    """Rotary table (T, rotated_dims / 2) in the compute dtype."""
    mask: Tensor | None
    """Attention mask from `visible`; None: each token attends to itself and to all earlier tokens of its segment."""
    segments: Segments | None
    """None: all tokens of a sequence are one segment."""
    cache: KVCache | None
    past: int
    """Number of tokens in the cache before these."""
    values: Mapping[int, Tensor]
    """Value embeddings (B, T, kv_dim) by layer."""

    def last(self, count: int, mask: Tensor) -> Tokens:
        """Only the last `count` tokens. They need `mask`, because is_causal aligns the queries with the first keys."""
        return self._replace(cos=self.cos[-count:], sin=self.sin[-count:], mask=mask)


def project(x: Tensor, head_dim: int, *matrices: Weight) -> Tensor:
    """x (B, T, D) times each matrix (heads * h, D), one after another: (B, T, all heads, h). Plain matrices are
    multiplied in one product, which reads x once; for a single token, copying them would cost more than it saves."""
    if x.size(1) > 1 and all(isinstance(w, Tensor) for w in matrices):
        product = F.linear(x, torch.cat(matrices))
    else:
        product = torch.cat([linear(x, w) for w in matrices], dim=-1)
    return product.unflatten(-1, (-1, head_dim))


def attention(
    n: Tensor,
    w: Mapping[str, Weight],
    index: int,
    planned: LayerPlan,
    tokens: Tokens,
    last: tuple[int, Tensor] | None = None,
) -> Tensor:
    """Output (B, T, D) for the normalized input n (B, T, D). Queries attend to these tokens, and with a cache to those
    that it holds for layer `index` of the plan. `last` as in `layer`.

    Heads stay in the layout (B, T, heads, h) of the product up to the attention itself, which takes and returns any
    strides: in (B, heads, T, h), norm, rotation and gain would read and write copies."""
    head_dim, gain = tokens.config.head_dim, w["q_gain"]
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
        n = n[:, -last[0] :]
        q = norm_rotate(project(n, head_dim, w["c_q"]), queries.cos, queries.sin, gain)
    if planned.row in tokens.values:
        v = v + tokens.values[planned.row].unflatten(-1, (-1, head_dim))
    own = v[:, -q.size(1) :]
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    if tokens.cache is not None:
        k, v = tokens.cache.extend(index, k, v)
    if tokens.segments is not None and last is None:
        y = attend_within(q, k, v, tokens.segments)
    else:
        causal = queries.mask is None and not queries.past
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=queries.mask, is_causal=causal, enable_gqa=True)
    y = y.transpose(1, 2)
    gate = output_gate(n, w, tokens.config)
    if planned.xsa:
        y = exclusive(y, own, gate)
    elif gate is not None:
        y = y * gate[..., None]
    return linear(y.flatten(2), w["attn_proj"])


def beside(output: Tensor, n: Tensor, path: Weight | None) -> Tensor:
    """`output` (B, t, D) with n pathᵀ of the last t tokens of n (B, T, D) added, if there is a path."""
    return output if path is None else output + linear(n[:, -output.size(1) :], path)


class Skip(NamedTuple):
    """The output of an earlier layer (B, T, D) that is mixed into x: keep x + add output."""

    output: Tensor
    add: Tensor
    """(D,), like `keep`."""
    keep: Tensor | None = None
    """None: all of x. Not ones: torch 2.13 compiles factor * ones into a backward that writes over the parameter in
    which factor lies (LOG.md)."""

    def into(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """factor (keep x + add output), factor 0-d or (D,), None for 1: by one vector for each of both tensors. The
        gradient of every factor follows from two sums over the tokens, and x with the skip is no tensor that the
        backward needs."""
        kept, add = self.keep, self.add
        if factor is not None:
            kept, add = factor.expand_as(add) if kept is None else factor * kept, factor * add
        return (x if kept is None else scaled(x, kept)) + scaled(self.output, add)


Streams = tuple[Tensor, Tensor | None]
"""The residual stream (B, T, D), and the second lane where there is one."""


def layer(
    streams: Streams,
    x0: Tensor,
    skip: Skip | None,
    w: Mapping[str, Weight],
    index: int,
    planned: LayerPlan,
    tokens: Tokens,
    last: tuple[int, Tensor] | None = None,
) -> Streams:
    """The streams after layer `index` of the plan. `w` holds its weights by parameter name. With `last` = (count,
    mask), results have only the last `count` tokens, (B, count, D); the other tokens only provide keys and values."""
    x, lane = streams
    slope, kind = tokens.config.mlp_slope, planned.residual

    def normed(x: Tensor) -> Tensor:
        return rms_norm(x, planned.input_scale)

    def fed(x: Tensor) -> Tensor:
        n = normed(x)
        return beside(mlp(n, w["mlp_fc"], w["mlp_proj"], slope), n, w.get("mlp_path"))

    # Indexed, not unbound: torch 2.13 compiles a stack of column sums into one that never gets them
    # (bench/kernel_counts.py raises if this happens).
    mix = w["resid_mix"]
    mixed = scaled(x, mix[0]) if skip is None else skip.into(x, mix[0])
    read = mixed + scaled(x0, mix[1])
    n = normed(read)
    attended = beside(attention(n, w, index, planned, tokens, last), n, w.get("attn_path"))
    if lane is None and kind in ("merged", "routed"):
        lane = x if skip is None or kind == "routed" else skip.into(x)
    if last is not None:
        x, read = (t[:, -last[0] :] for t in (x, read))
        lane = None if lane is None else lane[:, -last[0] :]
        skip = skip and skip._replace(output=skip.output[:, -last[0] :])
    if kind == "sequential":
        x = read + attended
        return x + fed(x), None
    if kind == "one_lane":
        return read + attended + fed(read), None
    if kind == "merged":
        return read + attended, lane + fed(lane)
    keep, post, result = w["resid_lambdas"], w["post_lambdas"], fed(lane)
    kept = keep[0] * x if skip is None else skip.into(x, keep[0]), keep[1] * lane
    x, lane = (t + post[0, i] * attended + post[1, i] * result for i, t in enumerate(kept))
    return x, lane
