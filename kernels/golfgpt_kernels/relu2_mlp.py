"""relu² MLP:  y = relu(x W1ᵀ)² W2ᵀ, and its first half, linear_relu2:  h = relu(x Wᵀ)².

Shapes: x (..., K); w (N, K); w_fc (H, K); w_proj (N, H). Any leading dimensions, any strides. Weights are
rounded to x's dtype, as a fp32 master weight under bf16 activations wants it.

`negative_slope` s gives LeakyReLU²: h = leaky_relu(z, s)², which is z² for z > 0 and s²z² otherwise: the
square drops the sign, as published (s = 0.5).

Precision: z = x Wᵀ is accumulated in fp32 and rounded to x's dtype, the activation is rounded to x's
dtype once more, then the down projection. 16-bit inputs thus see two roundings between the matmuls.

Backward, with a = leaky_relu(z, s), a' = 1 for z > 0 and s otherwise (relu: s = 0), g = dy W2
(linear_relu2: g = dh):
    dz = 2 a a' g      dx = dz W1      dW1 = dzᵀ x      dW2 = dyᵀ h

Sources: So et al., "Primer", arXiv:2109.08668 (relu²); LeakyReLU² is folklore of the speed-run records.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Impl, check_floats, check_impl, check_linear

__all__ = [
    "linear_relu2",
    "linear_relu2_cost",
    "linear_relu2_ref",
    "relu2_mlp",
    "relu2_mlp_cost",
    "relu2_mlp_ref",
]


def linear_relu2_ref(x: Tensor, w: Tensor, *, negative_slope: float = 0.0) -> Tensor:
    z = F.linear(x, w.to(x.dtype))
    a = F.leaky_relu(z, negative_slope) if negative_slope else torch.relu(z)
    return a * a  # not pow or square: autocast would send those to fp32 and the down projection back


def relu2_mlp_ref(x: Tensor, w_fc: Tensor, w_proj: Tensor, *, negative_slope: float = 0.0) -> Tensor:
    h = linear_relu2_ref(x, w_fc, negative_slope=negative_slope)
    return F.linear(h, w_proj.to(x.dtype))


def linear_relu2_cost(rows: int, k: int, n: int, *, itemsize: int = 2) -> tuple[int, int]:
    """(flops, bytes) of the forward: x and w read once, h written once."""
    return 2 * rows * k * n, itemsize * (rows * k + n * k + rows * n)


def relu2_mlp_cost(rows: int, k: int, hidden: int, n: int, *, itemsize: int = 2) -> tuple[int, int]:
    """(flops, bytes) of the forward: h is written by the first matmul and read by the second."""
    up = linear_relu2_cost(rows, k, hidden, itemsize=itemsize)
    down = linear_relu2_cost(rows, hidden, n, itemsize=itemsize)
    return up[0] + down[0], up[1] + down[1]


def linear_relu2(x: Tensor, w: Tensor, *, negative_slope: float = 0.0, impl: Impl = "auto") -> Tensor:
    """relu(x wᵀ)²: x (..., K), w (N, K) -> (..., N) in x's dtype."""
    check_impl("linear_relu2", impl, x.device)
    check_floats("linear_relu2", x=x, w=w)
    check_linear("linear_relu2", x, w)
    _check_slope("linear_relu2", negative_slope)
    return linear_relu2_ref(x, w, negative_slope=negative_slope)


def relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor, *, negative_slope: float = 0.0, impl: Impl = "auto") -> Tensor:
    """relu(x w_fcᵀ)² w_projᵀ: x (..., K), w_fc (H, K), w_proj (N, H) -> (..., N) in x's dtype."""
    check_impl("relu2_mlp", impl, x.device)
    check_floats("relu2_mlp", x=x, w_fc=w_fc, w_proj=w_proj)
    check_linear("relu2_mlp", x, w_fc, w_name="w_fc")
    if w_proj.ndim != 2 or w_proj.shape[1] != w_fc.shape[0]:
        raise ValueError(
            f"relu2_mlp: w_proj has shape {tuple(w_proj.shape)} and w_fc {tuple(w_fc.shape)}; "
            f"possible: w_proj (N, {w_fc.shape[0]})"
        )
    _check_slope("relu2_mlp", negative_slope)
    return relu2_mlp_ref(x, w_fc, w_proj, negative_slope=negative_slope)


def _check_slope(op: str, negative_slope: float) -> None:
    if not (math.isfinite(negative_slope) and negative_slope >= 0):
        raise ValueError(f"{op}: negative_slope={negative_slope}; possible: a finite number >= 0")
