"""relu² MLP:  y = relu(x W1ᵀ)² W2ᵀ, and its first half, linear_relu2:  h = relu(x Wᵀ)².

Shapes: x (..., K); w (N, K); w_fc (H, K); w_proj (N, H). Any leading dimensions, any strides. Weights are
rounded to x's dtype, as is right for a fp32 master weight under bf16 activations; their gradients have the
weights' dtype. Under autocast x is rounded first, as F.linear does.

`negative_slope` s gives LeakyReLU²: h = leaky_relu(z, s)², which is z² for z > 0 and s²z² otherwise: the
square drops the sign, as published (s = 0.5).

Backward, with a = leaky_relu(z, s), a' = 1 for z > 0 and s otherwise (relu: s = 0), g = dy W2
(linear_relu2: g = dh):
    dz = 2 a a' g      dx = dz W1      dW1 = dzᵀ x      dW2 = dyᵀ h

Eager: z is accumulated in fp32 and rounded to x's dtype, the activation is rounded once more, then the down
projection: two roundings between the matmuls.

Kernels, over TMA tiles; the down projection and dx are torch.mm.
- up: z stays fp32 through the activation and h is rounded once. h is the only tensor saved besides the
  inputs: the down projection and dW2 read it anyway, and |a| = sqrt(h). z itself would be a second tensor of
  the size of h, written and read back (134 MB each way at 65,536 x 1024 in bf16).
- dz: the GEMM dy W2 with 2 a a' in its epilogue, so g never exists in memory. With s > 0 the sign of z is
  needed too. It travels in the last mantissa bit of h, which is rounded to the nearest value whose last bit
  is that sign: the error of h grows from half an ulp to one, which is what eager's two roundings cost, and
  both passes move as many bytes as for relu.
- weight gradients: `_weight_grad.py`.
The accumulator leaves through shared memory in halves: whole, a 128 x 256 tile with its operands does not
fit into 227 KB.

In fp16 the gradient loses precision where activations are small: h = a² is a subnormal number below |a| = 8e-3, so for
pre-activations of standard deviation 0.01 (0.003) the gradients' relative error is 1.4e-3 (1e-2) for relu and twice
that with a slope, eager's 4e-4. bf16 and fp32 keep their precision down to 1e-19.

Left out on purpose: the one-kernel MLP (an h row on chip needs 260 KB or spills; published at +41 % of the
step), saving z and h, fp8.

Sources: So et al., "Primer", arXiv:2109.08668 (relu²); LeakyReLU² is folklore of the speed-run records, and
so are the activation in the GEMM's epilogue and the square root in place of a saved z (modded-nanogpt,
records 59 and 87). The sign in the mantissa is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import GluonImpl, autocast, check_floats, check_linear, resolve, runs_triton
from ._jit import (
    GLUON_MISSING,
    ceil_div,
    descriptor,
    dot,
    dot_precision,
    empty_rows,
    halves,
    jit,
    launch,
    narrow,
    num_programs,
    tl,
)
from ._ops import add_op_namespace_prefix
from ._tiles import INTERPRETED_GEMM, Tile, TileTable, compute_capability
from ._weight_grad import weight_grad


def linear_relu2_ref(x: Tensor, w: Tensor, *, negative_slope: float = 0.0) -> Tensor:
    z = F.linear(x, w.to(x.dtype))
    a = F.leaky_relu(z, negative_slope) if negative_slope else torch.relu(z)
    return a * a  # not pow or square: autocast would send those to fp32 and the down projection back


def relu2_mlp_ref(x: Tensor, w_fc: Tensor, w_proj: Tensor, *, negative_slope: float = 0.0) -> Tensor:
    h = linear_relu2_ref(x, w_fc, negative_slope=negative_slope)
    return F.linear(h, w_proj.to(x.dtype))


# ---- tiles


_FWD_TILES = TileTable(
    "linear_relu2_fwd",
    "rows",
    *INTERPRETED_GEMM,
    Tile(sm=80, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
    # BLOCK_K 16 spills in triton 3.8 and 3.9: in tf32 with 2 stages (4 instructions), in fp32 with 3 or 4 (6).
    Tile(sm=80, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}),
    Tile(sm=90, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}),
    Tile(sm=90, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}),
)
_DZ_TILES = TileTable(
    "relu2_mlp_dz",
    "rows",
    *INTERPRETED_GEMM,
    Tile(sm=80, itemsize=2, launch={"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
    Tile(sm=80, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}),
    Tile(sm=90, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
    Tile(sm=90, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}),
)


# ---- kernels


@jit
def _activate(z, slope, DTYPE: tl.constexpr, LEAKY: tl.constexpr):
    """h of z (fp32), rounded to DTYPE; its last mantissa bit is the sign of z if LEAKY. NaN stays NaN."""
    if not LEAKY:
        a = tl.where(z < 0, 0.0, z)
        return narrow(a * a, DTYPE)
    a = tl.where(z < 0, slope * z, z)
    square = a * a
    # In the bits of fp32 UNIT is DTYPE's last mantissa bit. Of the multiples of 2 UNIT, plus UNIT for a negative z, the
    # nearest is taken. 2^-14 lifts fp16's subnormals, a fixed-point grid, onto normal numbers of the same spacing.
    UNIT: tl.constexpr = 1 << (23 - DTYPE.fp_mantissa_width)
    LIFT: tl.constexpr = 2.0**-14 if DTYPE.fp_mantissa_width == 10 else 0.0
    low = square < LIFT
    sign = tl.where(z < 0, UNIT, 0)
    bits = tl.where(low, square + LIFT, square).to(tl.int32, bitcast=True)
    h = (((bits - sign + UNIT) & (-2 * UNIT)) | sign).to(tl.float32, bitcast=True)
    h = tl.where(low, h - LIFT, h)
    return narrow(tl.where(square < float("inf"), h, square), DTYPE)


@jit
def _activation_grad(h, slope, LEAKY: tl.constexpr):
    """2 a a' from h, in fp32."""
    root = 2 * tl.sqrt(h.to(tl.float32))
    if not LEAKY:
        return root
    INT: tl.constexpr = tl.int16 if h.dtype.primitive_bitwidth == 16 else tl.int32
    return tl.where((h.to(INT, bitcast=True) & 1) != 0, -slope * root, root)


@jit
def _linear_relu2_fwd_kernel(
    x_desc, w_desc, h_desc, slope,
    M, N, K,
    LEAKY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    # flatten: the loads of the next tile start while this one's epilogue runs. Row by row: the x of all tiles in
    # flight (22 row blocks at N = 1536, 3 MB) and w stay in L2.
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=True):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * BLOCK_N
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            z = dot(x_desc.load([m, k]), w_desc.load([n, k]).T, z, PRECISION)
        left, right = halves(z, BLOCK_M, BLOCK_N)
        h_desc.store([m, n], _activate(left, slope, h_desc.dtype, LEAKY))
        h_desc.store([m, n + BLOCK_N // 2], _activate(right, slope, h_desc.dtype, LEAKY))


@jit
def _relu2_mlp_dz_kernel(
    dy_desc, w_desc, h_desc, dz_desc, slope,
    M, N, K,
    LEAKY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz (M, N) = 2 a a' (dy w), with dy (M, K) and w (K, N) = w_proj as it lies: wgmma reads either order of B."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=True):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * BLOCK_N
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            g = dot(dy_desc.load([m, k]), w_desc.load([k, n]), g, PRECISION)
        left, right = halves(g, BLOCK_M, BLOCK_N)
        h = h_desc.load([m, n])
        dz_desc.store([m, n], narrow(left * _activation_grad(h, slope, LEAKY), dz_desc.dtype))
        h = h_desc.load([m, n + BLOCK_N // 2])
        dz_desc.store([m, n + BLOCK_N // 2], narrow(right * _activation_grad(h, slope, LEAKY), dz_desc.dtype))


@jit
def _relu2_dz_kernel(
    dh_desc, h_desc, dz_desc, slope, LEAKY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dz = 2 a a' dh, where no matmul comes before it."""
    m = tl.program_id(0) * BLOCK_M
    n = tl.program_id(1) * BLOCK_N
    grad = dh_desc.load([m, n]).to(tl.float32) * _activation_grad(h_desc.load([m, n]), slope, LEAKY)
    dz_desc.store([m, n], narrow(grad, dz_desc.dtype))


# ---- launchers: 2-d operands of one dtype, checked by the public functions


def linear_relu2_fwd(x: Tensor, w: Tensor, slope: float, tile: dict | None = None) -> Tensor:
    (m, k), n = x.shape, w.shape[0]
    h = empty_rows((m, n), x.dtype, x.device)
    if h.numel() == 0 or k == 0:
        return h.zero_()
    tile = tile or _FWD_TILES.select(x.device, x.dtype, m)
    bm, bn, bk = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    grid = (min(num_programs(x.device), ceil_div(m, bm) * ceil_div(n, bn)),)
    operands = descriptor(x, (bm, bk)), descriptor(w, (bn, bk)), descriptor(h, (bm, bn // 2))
    leaky, precision = slope != 0, dot_precision(x.dtype)
    launch(_linear_relu2_fwd_kernel, grid, x.device, *operands, slope, m, n, k, leaky, precision, **tile)
    return h


def relu2_mlp_dz(dy: Tensor, w: Tensor, h: Tensor, slope: float, tile: dict | None = None) -> Tensor:
    (m, k), n = dy.shape, w.shape[1]
    dz = empty_rows((m, n), dy.dtype, dy.device)
    if dz.numel() == 0 or k == 0:
        return dz.zero_()
    tile = tile or _DZ_TILES.select(dy.device, dy.dtype, m)
    bm, bn, bk = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    grid = (min(num_programs(dy.device), ceil_div(m, bm) * ceil_div(n, bn)),)
    operands = (
        descriptor(dy, (bm, bk)), descriptor(w, (bk, bn)), descriptor(h, (bm, bn // 2)), descriptor(dz, (bm, bn // 2)),
    )  # fmt: skip
    leaky, precision = slope != 0, dot_precision(dy.dtype)
    launch(_relu2_mlp_dz_kernel, grid, dy.device, *operands, slope, m, n, k, leaky, precision, **tile)
    return dz


def relu2_dz(dh: Tensor, h: Tensor, slope: float) -> Tensor:
    dz = empty_rows(dh.shape, dh.dtype, dh.device)
    if dz.numel() == 0:
        return dz
    block = (32, 128)
    grid = (ceil_div(dh.shape[0], block[0]), ceil_div(dh.shape[1], block[1]))
    operands = (descriptor(tensor, block) for tensor in (dh, h, dz))
    launch(_relu2_dz_kernel, grid, dh.device, *operands, slope, slope != 0, *block, num_warps=8)
    return dz


def gemms(gluon: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """linear_relu2_fwd and relu2_mlp_dz of that form."""
    if not gluon:
        return linear_relu2_fwd, relu2_mlp_dz
    # Here, because that file needs this one, and Gluon.
    from ._relu2_mlp_gluon import linear_relu2_fwd as up
    from ._relu2_mlp_gluon import relu2_mlp_dz as dz

    return up, dz


# ---- custom ops and their gradients


@torch.library.custom_op(add_op_namespace_prefix("linear_relu2"), mutates_args=())
def _linear_relu2(x: Tensor, w: Tensor, slope: float, gluon: bool) -> Tensor:
    up, _ = gemms(gluon)
    return up(x, w.to(x.dtype), slope)


@torch.library.custom_op(add_op_namespace_prefix("relu2_dz"), mutates_args=())
def _relu2_dz(dh: Tensor, h: Tensor, slope: float) -> Tensor:
    return relu2_dz(dh, h, slope)


@torch.library.custom_op(add_op_namespace_prefix("relu2_mlp"), mutates_args=())
def _relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor, slope: float, gluon: bool) -> tuple[Tensor, Tensor]:
    up, _ = gemms(gluon)
    h = up(x, w_fc.to(x.dtype), slope)
    return F.linear(h, w_proj.to(x.dtype)), h


@torch.library.custom_op(add_op_namespace_prefix("relu2_mlp_dz"), mutates_args=())
def _relu2_mlp_dz(dy: Tensor, w_proj: Tensor, h: Tensor, slope: float, gluon: bool) -> Tensor:
    _, dz = gemms(gluon)
    return dz(dy, w_proj.to(dy.dtype), h, slope)


@_linear_relu2.register_fake
def _(x, w, slope, gluon):
    return empty_rows((x.shape[0], w.shape[0]), x.dtype, x.device)


@_relu2_dz.register_fake
def _(dh, h, slope):
    return empty_rows(dh.shape, dh.dtype, dh.device)


@_relu2_mlp.register_fake
def _(x, w_fc, w_proj, slope, gluon):
    h = empty_rows((x.shape[0], w_fc.shape[0]), x.dtype, x.device)
    return x.new_empty((x.shape[0], w_proj.shape[0])), h


@_relu2_mlp_dz.register_fake
def _(dy, w_proj, h, slope, gluon):
    return empty_rows(h.shape, dy.dtype, dy.device)


def _save_linear_relu2(ctx, inputs, output):
    x, w, ctx.slope, _ = inputs
    ctx.save_for_backward(x, w, output)


def _linear_relu2_backward(ctx, dh):
    x, w, h = ctx.saved_tensors
    dz = _relu2_dz(dh, h, ctx.slope)
    dx = dz @ w.to(x.dtype) if ctx.needs_input_grad[0] else None
    dw = weight_grad(dz, x, w.dtype) if ctx.needs_input_grad[1] else None
    return dx, dw, None, None


_linear_relu2.register_autograd(_linear_relu2_backward, setup_context=_save_linear_relu2)


def _save_relu2_mlp(ctx, inputs, output):
    x, w_fc, w_proj, ctx.slope, ctx.gluon = inputs
    ctx.save_for_backward(x, w_fc, w_proj, output[1])
    ctx.set_materialize_grads(False)


def _relu2_mlp_backward(ctx, dy, _dh):
    x, w_fc, w_proj, h = ctx.saved_tensors
    dx = dw_fc = dw_proj = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dz = _relu2_mlp_dz(dy, w_proj, h, ctx.slope, ctx.gluon)
        dx = dz @ w_fc.to(x.dtype) if ctx.needs_input_grad[0] else None
        dw_fc = weight_grad(dz, x, w_fc.dtype) if ctx.needs_input_grad[1] else None
    if ctx.needs_input_grad[2]:
        dw_proj = weight_grad(dy, h, w_proj.dtype)
    return dx, dw_fc, dw_proj, None, None


_relu2_mlp.register_autograd(_relu2_mlp_backward, setup_context=_save_relu2_mlp)


# ---- public


def linear_relu2(x: Tensor, w: Tensor, *, negative_slope: float = 0.0, impl: GluonImpl = "auto") -> Tensor:
    """relu(x wᵀ)²: x (..., K), w (N, K) -> (..., N) in x's dtype. For impl="gluon" see `relu2_mlp`."""
    check_floats("linear_relu2", x=x, w=w)
    check_linear("linear_relu2", x, w)
    _check_slope("linear_relu2", negative_slope)
    x, lead = autocast(x), x.shape[:-1]
    form = _form("linear_relu2", impl, x, lead.numel())
    if form == "eager":
        return linear_relu2_ref(x, w, negative_slope=negative_slope)
    h = _linear_relu2(x.reshape(lead.numel(), x.shape[-1]), w, float(negative_slope), form == "gluon")
    return h.reshape(*lead, w.shape[0])


def relu2_mlp(
    x: Tensor, w_fc: Tensor, w_proj: Tensor, *, negative_slope: float = 0.0, impl: GluonImpl = "auto"
) -> Tensor:
    """relu(x w_fcᵀ)² w_projᵀ: x (..., K), w_fc (H, K), w_proj (N, H) -> (..., N) in x's dtype.

    impl="gluon" takes the up and the dz GEMM of _relu2_mlp_gluon.py (sm_90, fp16 and bf16, triton 3.6 to 3.9), which
    has never run; the rest is as for "triton". Where it cannot run it is a RuntimeError with the reason. "auto" means
    it only if `set_implementation` says so.
    """
    check_floats("relu2_mlp", x=x, w_fc=w_fc, w_proj=w_proj)
    check_linear("relu2_mlp", x, w_fc, w_name="w_fc")
    if w_proj.ndim != 2 or w_proj.shape[1] != w_fc.shape[0]:
        raise ValueError(
            f"relu2_mlp: w_proj has shape {tuple(w_proj.shape)} and w_fc {tuple(w_fc.shape)}; "
            f"expected w_proj (N, {w_fc.shape[0]})"
        )
    _check_slope("relu2_mlp", negative_slope)
    x, lead = autocast(x), x.shape[:-1]
    form = _form("relu2_mlp", impl, x, lead.numel())
    if form == "eager":
        return relu2_mlp_ref(x, w_fc, w_proj, negative_slope=negative_slope)
    y, _ = _relu2_mlp(x.reshape(lead.numel(), x.shape[-1]), w_fc, w_proj, float(negative_slope), form == "gluon")
    return y.reshape(*lead, w_proj.shape[0])


def _form(op: str, impl: GluonImpl, x: Tensor, rows: int) -> Literal["triton", "gluon", "eager"]:
    """What computes `op`; raises as runs_triton does."""
    if resolve(op, impl) != "gluon":
        return "triton" if runs_triton(op, impl, x, rows) else "eager"
    if reason := gluon_cannot_run(x.device, x.dtype):
        raise RuntimeError(f"impl='gluon' cannot run: {reason}; impl='eager' can")
    return "gluon"


def gluon_cannot_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why impl="gluon" would raise for tensors of this device and dtype; None if it would run."""
    reasons = [GLUON_MISSING]
    if device.type != "cuda":
        reasons.append(f"tensors are on {device}, not on CUDA, and Triton's interpreter does not know Gluon")
    elif (sm := compute_capability(device)) // 10 != 9:
        reasons.append(f"it is for sm_90, and {torch.cuda.get_device_name(device)} is sm_{sm}")
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it computes in torch.float16 and torch.bfloat16, not in {dtype}")
    return "; ".join(filter(None, reasons)) or None


def _check_slope(op: str, negative_slope: float) -> None:
    if not (math.isfinite(negative_slope) and negative_slope >= 0):
        raise ValueError(f"{op}: negative_slope={negative_slope}; expected a finite number >= 0")
