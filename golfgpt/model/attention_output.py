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

import torch
import torch.nn.functional as F
from torch import Tensor

from golfgpt.config import ModelConfig


class _Exclusive(torch.autograd.Function):
    """gate (y - (y o) oᵀ) for the G query heads of each key-value head. With e = gate dz,
        dy = e - (e o) oᵀ      do = -Σ_G ((e o) y + (y o) e)      dgate = dz (y - (y o) oᵀ)
    One head of each group at a time: all sums then run over the h channels of the K key-value heads. Inductor makes one
    kernel of the forward and one of the backward, where autograd's sum over G would be a second one that reads y and dz
    again."""

    @staticmethod
    def forward(ctx, y: Tensor, own: Tensor, gate: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, own, gate)
        out = [head - _dot(head, own) * own for head in y.unbind(3)]
        return torch.stack(out if gate is None else [z * g for z, g in zip(out, _by_head(gate), strict=True)], dim=3)

    @staticmethod
    def backward(ctx, dz: Tensor) -> tuple[Tensor | None, ...]:
        y, own, gate = ctx.saved_tensors
        dy, dgate, down = [], [], torch.zeros_like(own)
        gates = [None] * y.size(3) if gate is None else _by_head(gate)
        for head, e, g in zip(y.unbind(3), dz.unbind(3), gates, strict=True):
            along = _dot(head, own)
            if g is not None:
                dgate.append(_dot(e, head - along * own))
                e = g * e
            across = _dot(e, own)
            dy.append(e - across * own)
            down = down - across * head - along * e
        return torch.stack(dy, dim=3), down, None if gate is None else torch.cat(dgate, dim=3)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _by_head(gate: Tensor) -> list[Tensor]:
    return [g[..., None] for g in gate.unbind(3)]


def exclusive(y: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
    """y (B, T, H, h) without its component along v (B, T, K, h), the values of the same tokens; then times `gate`
    (B, T, H)."""
    groups = v.size(2), y.size(2) // v.size(2)
    own = F.normalize(v, dim=-1, eps=1e-12)
    return _Exclusive.apply(y.unflatten(2, groups), own, None if gate is None else gate.unflatten(2, groups)).flatten(
        2, 3
    )


def output_gate(u: Tensor, w: Mapping[str, Tensor], config: ModelConfig) -> Tensor | None:
    """The gates (B, T, H), computed from u (B, T, D); None if the config has none."""
    kind = config.attn_gate
    if kind == "none":
        return None
    if kind == "dense":
        return F.linear(u, w["attn_gate"].to(u.dtype)).sigmoid()
    if kind == "sparse":
        return (config.attn_gate_scale * F.linear(u[..., : config.gate_window], w["attn_gate"].to(u.dtype))).sigmoid()
    return 2 * F.linear(u[..., : config.gate_window], w["window_gate"].to(u.dtype)).sigmoid()
