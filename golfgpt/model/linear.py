"""What layers and mechanisms are made of: the product with a matrix, which may be wrapped, and the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LoRA(NamedTuple):
    """A matrix with a low-rank correction, w + b a, of rank r."""

    w: Weight
    """(out, in)."""
    a: Tensor
    """(r, in), or (B, r, in) for one per sequence."""
    b: Tensor
    """(out, r), or (B, out, r) for one per sequence."""


class Observed(NamedTuple):
    """A matrix with a callback that receives its inputs."""

    w: Weight
    see: Callable[[Tensor], None]
    """Called with each input (..., in) before the multiplication."""


Weight = Tensor | LoRA | Observed


def linear(x: Tensor, w: Weight) -> Tensor:
    """x wᵀ, (..., in) -> (..., out)."""
    if isinstance(w, LoRA):
        return linear(x, w.w) + x @ w.a.mT @ w.b.mT
    if isinstance(w, Observed):
        w.see(x)
        return linear(x, w.w)
    return F.linear(x, w)


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last dimension. Keeps the dtype; eps is 1.19e-7, that of float32."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)
