"""SmearGate: blend each token's embedding x with x', that of the token before, by g = sigmoid(smear_gate).

    "after_norm"   x0 = (1 - g) x + g x'            of x after the embedding's norm (R5)
    "before_norm"  x0 = norm(g x + (1 - g) x')      (PR #65)

x' is 0 where there is no token before.
"""

from __future__ import annotations

from torch import Tensor

from golfgpt.model.layers import rms_norm


def smear(kind: str, x: Tensor, before: Tensor, smear_gate: Tensor) -> Tensor:
    """x0 (B, T, D) of x and `before` (B, T, D); smear_gate (D,) float32."""
    g = smear_gate.sigmoid().to(x.dtype)
    return (1 - g) * x + g * before if kind == "after_norm" else rms_norm(g * x + (1 - g) * before)
