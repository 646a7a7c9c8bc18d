"""What happens to the attention's result y (B, T, H, h) before its projection: exclusive self-attention and gates.

    exclusive       y - (y v̂) v̂ᵀ with v̂ = v / |v|: y without its component along the token's own value v. What the
                    token already holds need not be read from it again. (PR #287; in records from 2026-03-20 on)
    "window"        y * 2 sigmoid(W u[:gate_window])                      (2026-04-16)
    "dense"         y * sigmoid(W u)                                      (2026-04-19)
    "sparse"        y * sigmoid(attn_gate_scale W u[:gate_window])        (2026-04-23)

u is the attention's input, after its norm and scale; the gate is one number for each head and token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from golfgpt.config import ModelConfig


def exclusive(y: Tensor, v: Tensor) -> Tensor:
    """y (B, T, H, h) without its component along v (B, T, K, h), the values of the same tokens."""
    own = F.normalize(v, dim=-1, eps=1e-12).unsqueeze(3)
    grouped = y.unflatten(2, (v.size(2), -1))
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)


def gated(y: Tensor, u: Tensor, w: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """y (B, T, H, h) times the gates computed from u (B, T, D)."""
    kind = config.attn_gate
    if kind == "none":
        return y
    if kind == "dense":
        gate = F.linear(u, w["attn_gate"].to(u.dtype)).sigmoid()
    elif kind == "sparse":
        gate = (config.attn_gate_scale * F.linear(u[..., : config.gate_window], w["attn_gate"].to(u.dtype))).sigmoid()
    else:
        gate = 2 * F.linear(u[..., : config.gate_window], w["window_gate"].to(u.dtype)).sigmoid()
    return y * gate[..., None]
