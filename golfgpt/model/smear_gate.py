"""SmearGate: mix each token's embedding x with x', the embedding of the previous token, by g = sigmoid(smear_gate).

    "after_norm"   x0 = (1 - g) x + g x'            x is normalized before (R5)
    "before_norm"  x0 = norm(g x + (1 - g) x')      (PR #65)
    "input"        x0 = norm(x + smear_lambda sigmoid(smear_window x[:gate_window]) x')      (2026-04-27)

x' is 0 if there is no previous token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from golfgpt.model.linear import rms_norm


def smear(kind: str, x: Tensor, before: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """x0 (B, T, D) from x and `before` (B, T, D), the x' of the equations. `weights` are float32."""
    if kind == "input":
        window = weights["smear_window"].to(x.dtype)
        gate = F.linear(x[..., : window.size(1)], window).sigmoid()
        return rms_norm(x + weights["smear_lambda"].to(x.dtype) * gate * before)
    g = weights["smear_gate"].sigmoid().to(x.dtype)
    return (1 - g) * x + g * before if kind == "after_norm" else rms_norm(g * x + (1 - g) * before)
