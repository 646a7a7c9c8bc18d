"""Rotary position embedding of normalized queries and keys, (B, T, heads, h).

    y = gain · rotate(x / rms(x))

Rotary embedding: Su et al., arXiv:2104.09864; pairs are half a head apart, as in GPT-NeoX. NTK-aware scaling of the
base (`ModelConfig.rope_base_at`): bloc97's note of 2023 on the context length of LLaMA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_table(start: int, length: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, dims / 2) in float32, of `dims` channels at the positions start to start + length - 1."""
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r channels of x (B, T, heads, h) by minus the angles of the table (T, r / 2); element i is
    paired with i + r / 2."""
    if 2 * cos.size(-1) < x.size(-1):
        turned, rest = x.tensor_split((2 * cos.size(-1),), dim=-1)
        return torch.cat((rotate(turned, cos, sin), rest), dim=-1)
    pairs = x.unflatten(-1, (2, -1))
    sines = torch.stack((sin, -sin), dim=-2)
    return (pairs * cos[:, None, None] + pairs.flip(-2) * sines[:, None]).flatten(-2)


class _NormRotate(torch.autograd.Function):
    """The gradient of the gain is a sum of what the norm's gradient needs anyway. With n = x / rms(x) and the
    rotation's transpose,
        s = Σ_h dy rotate(n)      dgain = Σ_BT s      dx = (gain rotateᵀ(dy) - n gain s / h) / rms(x)
    Kept are x and rms(x). Autograd would keep rotate(n) too, and read it and dy a second time for dgain."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = (wide.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
        ctx.save_for_backward(x, inverse_rms, cos, sin, gain)
        return rotate((wide * inverse_rms).to(x.dtype), cos, sin) * _per_head(gain.to(x.dtype), x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse_rms, cos, sin, gain = ctx.saved_tensors
        n, dy = x * inverse_rms, dy.to(inverse_rms.dtype)
        s = (dy * rotate(n, cos, sin)).sum(-1, keepdim=True)
        dx = inverse_rms * _per_head(gain, x) * (rotate(dy, cos, -sin) - n * (s / x.size(-1)))
        return dx.to(x.dtype), None, None, s[:, :, : len(gain)].sum((0, 1, 3)).to(gain.dtype)


def _per_head(gain: Tensor, x: Tensor) -> Tensor:
    return F.pad(gain, (0, x.size(-2) - len(gain)), value=1.0)[:, None]


def norm_rotate(x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> Tensor:
    """Normalize x (B, T, heads, h) over h, rotate its first r channels by the table (T, r / 2), and multiply the first
    heads by `gain`.

    Heads without a gain may follow: queries and keys take one pass together."""
    return _NormRotate.apply(x, cos, sin, gain)
