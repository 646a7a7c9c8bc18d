"""SmearGate: mix each token's embedding x with x', the embedding of the previous token, by g = sigmoid(smear_gate).

    "after_norm"   x0 = (1 - g) x + g x'            x is normalized before (R5)
    "before_norm"  x0 = norm(g x + (1 - g) x')      (PR #65)

x' is 0 if there is no previous token.
"""

from __future__ import annotations

from torch import Tensor

from golfgpt.model.linear import rms_norm


def smear(kind: str, x: Tensor, before: Tensor, smear_gate: Tensor) -> Tensor:
    """x0 (B, T, D) from x and `before` (B, T, D), the x' of the equations. smear_gate is (D,), float32."""
    g = smear_gate.sigmoid().to(x.dtype)
    return (1 - g) * x + g * before if kind == "after_norm" else rms_norm(g * x + (1 - g) * before)
