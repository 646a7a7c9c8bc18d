"""What layers and mechanisms are made of: products with a matrix, which may be wrapped, and with a vector; the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LoRA(NamedTuple):
    """A matrix with a low-rank correction, w + b a, of rank r; or the correction alone, as a path beside others."""

    w: Weight | None
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
        low_rank = x @ w.a.mT @ w.b.mT
        return low_rank if w.w is None else linear(x, w.w) + low_rank
    if isinstance(w, Observed):
        w.see(x)
        return linear(x, w.w)
    return F.linear(x, w)


class _Scaled(torch.autograd.Function):
    """Autograd would round the gradient of s, a sum over all tokens, to x's dtype and cast it to float32 afterwards."""

    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, s)
        return x * s.to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, s = ctx.saved_tensors
        dx = ds = None
        if ctx.needs_input_grad[0]:
            dx = (dy * s).to(x.dtype)  # s as it is: compiled, s.to(x.dtype) would be a tensor kept from the forward
        if ctx.needs_input_grad[1]:
            ds = (dy * x).sum(tuple(range(x.ndim - 1)), dtype=s.dtype)
        return dx, ds


def scaled(x: Tensor, s: Tensor) -> Tensor:
    """x (..., D) times the vector s (D,), in x's dtype; the gradient of s keeps its own."""
    return _Scaled.apply(x, s)


class _RmsNorm(torch.autograd.Function):
    """With n = x / rms(x):  dx = scale (dy - n mean(dy n)) / rms(x). Kept are x and rms(x). Of torch's formula the
    compiler keeps the float32 copy of x where a second lane is normalized: twice the bytes."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = (wide.square().mean(-1, keepdim=True) + torch.finfo(wide.dtype).eps).rsqrt()
        ctx.save_for_backward(x, inverse_rms)
        ctx.scale = scale
        return (wide * (inverse_rms * scale)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        x, inverse_rms = ctx.saved_tensors
        n = x * inverse_rms  # and dy as it is: compiled, a sum of many would be kept in float32 if it were cast first
        dx = inverse_rms * ctx.scale * (dy - n * (dy * n).mean(-1, keepdim=True))
        return dx.to(x.dtype), None


def rms_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """Divide by the root mean square of the last dimension and multiply by `scale`. Keeps the dtype; eps is 1.19e-7,
    that of float32."""
    return _RmsNorm.apply(x, scale)
