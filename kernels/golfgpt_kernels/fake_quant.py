"""Row quantizer to N-bit codes, and the linear layer that trains through it.

    c = clip magnitude of a row     s = max(c / qmax, scale_floor)     q = round(clamp(w, ±c) / s)     ŵ = q s
    qmax = 2^(bits-1) - 1           codes in [-qmax, qmax] ("symmetric") or [-qmax - 1, qmax] ("full")

Shapes: w (..., rows, cols), banks with leading dimensions included; codes as w, int8 whatever `bits` is;
scale (..., rows), or (..., rows, cols / group_size) where groups of `group_size` neighbouring columns
have their own scale.

clip "max": c = max |w|. clip "quantile": c = torch.quantile(|w|, 0.9999984, dim=-1), bit for bit in fp32.
Its rank 0.9999984 (cols - 1), computed in fp32, falls between the two largest magnitudes, which a top-2
finds without a sort.

Precision: fp32 throughout (float64 for float64 weights), true division, round half to even. The scale is
stored rounded to `scale_dtype`; `codes_from` says whether the codes divide by the value as stored
(decoding then undoes exactly what encoding did) or by the fp32 value before rounding (as upstream's int8
export does). ŵ is one fp32 product, rounded once to the dtype asked for.

Range of the stored scale. Below the smallest normal number of fp16 (6.1e-5: an 8-bit row whose maximum is
below 7.8e-3) the scale is rounded up to a multiple of 2^-24, since rounding to nearest with so few bits
would clip the row's maximum by up to a third; a row of magnitude 1e-6 keeps codes up to 17. bf16 and fp32
scales stop at their smallest normal number, 1.2e-38. The least positive scale stands for a zero row:
codes 0, no NaN. Above the largest finite number (65504) the scale saturates and so do the codes: never
inf, no host synchronization to find out. Published exports that stop at fp16's smallest normal number
instead of rounding up below it are scale_floor=2**-14.

Backward of the fake-quantized ops is straight-through, without a mask for clipped weights:
    y = x ŵᵀ      dx = dy ŵ      dw = dyᵀ x

Weights that are NaN or infinite are a ValueError on CPU; on CUDA and under torch.compile they are not
looked for.

Sources: Bengio et al., arXiv:1308.3432 (straight-through); the quantile is parameter-golf's int8 export.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import (
    FLOAT_DTYPES,
    Impl,
    accumulate_dtype,
    check_floats,
    check_impl,
    check_linear,
    values_readable,
)

__all__ = [
    "CLIP_QUANTILE",
    "dequantize_rows",
    "fake_quant_linear",
    "fake_quant_linear_cost",
    "fake_quant_linear_ref",
    "fake_quantize_rows",
    "quantize_rows",
    "quantize_rows_cost",
    "quantize_rows_ref",
]

CLIP_QUANTILE = 0.9999984
_QUANTILE_MAX_COLS = 500_000  # from 625,000 columns on the rank lies below the second largest magnitude

Clip = Literal["max", "quantile"]
CodeRange = Literal["symmetric", "full"]
CodesFrom = Literal["stored_scale", "float32_scale"]


def quantize_rows_ref(
    w: Tensor,
    *,
    bits: int,
    clip: str = "max",
    code_range: str = "symmetric",
    scale_dtype: torch.dtype = torch.float16,
    scale_floor: float = 0.0,
    codes_from: str = "stored_scale",
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    rows = w.to(accumulate_dtype(w.dtype)).contiguous()
    if group_size is not None:
        rows = rows.unflatten(-1, (-1, group_size))
    qmax = 2 ** (bits - 1) - 1
    c = _clip_magnitude(rows.abs(), clip).unsqueeze(-1)
    s = _representable((c / qmax).clamp(min=scale_floor), scale_dtype)
    scale = s.to(scale_dtype)
    s = scale.to(s.dtype) if codes_from == "stored_scale" else s
    codes = torch.round(rows.clamp(-c, c) / s).clamp(-qmax - (code_range == "full"), qmax)
    return codes.to(torch.int8).reshape(w.shape), scale.squeeze(-1)


def _clip_magnitude(magnitude: Tensor, clip: str) -> Tensor:
    if clip == "max":
        return magnitude.amax(dim=-1)
    cols = magnitude.shape[-1]
    top = magnitude.topk(min(2, cols), dim=-1).values
    rank = torch.full((), CLIP_QUANTILE, dtype=torch.float32, device=magnitude.device) * (cols - 1)
    return torch.lerp(top[..., -1], top[..., 0], (rank - rank.floor()).to(magnitude.dtype))


def _representable(s: Tensor, dtype: torch.dtype) -> Tensor:
    """s moved into the positive finite numbers of `dtype`; see "Range of the stored scale" above."""
    info = torch.finfo(dtype)
    step = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    s = torch.where(s < info.tiny, torch.ceil(s / step) * step, s)
    return s.clamp(min=step, max=info.max)


_opaque = torch.library.custom_op("golfgpt::quantize_rows", quantize_rows_ref, mutates_args=())


@_opaque.register_fake
def _(w: Tensor, *, scale_dtype=torch.float16, group_size=None, **_options):
    groups = () if group_size is None else (w.shape[-1] // group_size,)
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty((*w.shape[:-1], *groups), dtype=scale_dtype)


def _quantize(w: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Under torch.compile the quantizer is one opaque op: Inductor drops the round trip of the scale through fp16
    and may divide approximately, and then training would not see the weights that are exported."""
    w = w.detach()
    return _opaque(w, **options) if torch.compiler.is_compiling() else quantize_rows_ref(w, **options)


def fake_quant_linear_ref(x: Tensor, w: Tensor, *, bits: int, **options) -> Tensor:
    codes, scale = _quantize(w, bits=bits, **options)
    w_hat = dequantize_rows(codes, scale, dtype=x.dtype, group_size=options.get("group_size"))
    return F.linear(x, _StraightThrough.apply(w, w_hat))


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient to the first. The usual w + (ŵ - w).detach() rounds twice and is
    off by an ulp of ŵ; this is ŵ, so that training sees exactly the weights that the artifact decodes to."""

    @staticmethod
    def forward(ctx, w: Tensor, w_hat: Tensor) -> Tensor:
        ctx.dtype = w.dtype
        return w_hat.view_as(w_hat)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output.to(ctx.dtype), None


def quantize_rows_cost(rows: int, cols: int, *, itemsize: int = 4, scale_itemsize: int = 2) -> tuple[int, int]:
    """(flops, bytes): magnitude, maximum, clamp, divide and round per weight; codes are one byte each."""
    return 5 * rows * cols, rows * cols * (itemsize + 1) + rows * scale_itemsize


def fake_quant_linear_cost(
    tokens: int, rows: int, cols: int, *, itemsize: int = 2, master_itemsize: int = 4
) -> tuple[int, int]:
    """(flops, bytes) of the forward: master read once, ŵ written and read once, x read, y written."""
    traffic = itemsize * (tokens * cols + tokens * rows + 2 * rows * cols) + master_itemsize * rows * cols
    return 2 * tokens * rows * cols + 5 * rows * cols, traffic


def quantize_rows(
    w: Tensor,
    *,
    bits: int,
    clip: Clip = "max",
    code_range: CodeRange = "symmetric",
    scale_dtype: torch.dtype = torch.float16,
    scale_floor: float = 0.0,
    codes_from: CodesFrom = "stored_scale",
    group_size: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """w (..., rows, cols) -> int8 codes of w's shape and scale, (..., rows) or (..., rows, groups)."""
    check_impl("quantize_rows", impl, w.device)
    options = dict(
        bits=bits, clip=clip, code_range=code_range, scale_dtype=scale_dtype, scale_floor=scale_floor,
        codes_from=codes_from, group_size=group_size,
    )  # fmt: skip
    _check("quantize_rows", w, **options)
    return _quantize(w, **options)


def dequantize_rows(
    codes: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32, group_size: int | None = None
) -> Tensor:
    """codes × scale in fp32, rounded once to `dtype`: what an artifact decodes to."""
    _check_group("dequantize_rows", codes, group_size)
    shape = codes.shape[:-1] if group_size is None else (*codes.shape[:-1], codes.shape[-1] // group_size)
    if codes.dtype != torch.int8 or scale.dtype not in FLOAT_DTYPES or scale.shape != shape:
        raise ValueError(
            f"dequantize_rows: codes have shape {tuple(codes.shape)} and dtype {codes.dtype}, "
            f"scale {tuple(scale.shape)} and {scale.dtype}; "
            f"possible: int8 codes and a float scale of shape {tuple(shape)}"
        )
    rows = codes if group_size is None else codes.unflatten(-1, (-1, group_size))
    scale = scale.to(accumulate_dtype(scale.dtype)).unsqueeze(-1)
    return (rows.to(scale.dtype) * scale).to(dtype).reshape(codes.shape)


def fake_quantize_rows(
    w: Tensor,
    out: Tensor | None = None,
    *,
    bits: int,
    clip: Clip = "max",
    code_range: CodeRange = "symmetric",
    scale_dtype: torch.dtype = torch.float16,
    scale_floor: float = 0.0,
    codes_from: CodesFrom = "stored_scale",
    group_size: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """dequantize_rows(quantize_rows(w)) in w's dtype, with straight-through gradient.

    With `out`, of w's shape and any float dtype (a bf16 shadow of a fp32 master), the decoded weights are written
    there, rounded once from fp32, without gradient, and `out` is returned.
    """
    check_impl("fake_quantize_rows", impl, w.device)
    options = dict(
        bits=bits, clip=clip, code_range=code_range, scale_dtype=scale_dtype, scale_floor=scale_floor,
        codes_from=codes_from, group_size=group_size,
    )  # fmt: skip
    _check("fake_quantize_rows", w, **options)
    if out is None:
        codes, scale = _quantize(w, **options)
        w_hat = dequantize_rows(codes, scale, dtype=w.dtype, group_size=group_size)
        return _StraightThrough.apply(w, w_hat)
    check_floats("fake_quantize_rows", w=w, out=out)
    if out.shape != w.shape:
        raise ValueError(f"fake_quantize_rows: out has shape {tuple(out.shape)}; possible: {tuple(w.shape)}, as w")
    with torch.no_grad():
        codes, scale = _quantize(w, **options)
        return out.copy_(dequantize_rows(codes, scale, dtype=out.dtype, group_size=group_size))


def fake_quant_linear(
    x: Tensor,
    w: Tensor,
    *,
    bits: int,
    clip: Clip = "max",
    code_range: CodeRange = "symmetric",
    scale_dtype: torch.dtype = torch.float16,
    scale_floor: float = 0.0,
    codes_from: CodesFrom = "stored_scale",
    group_size: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """x ŵᵀ: x (..., K), w (N, K) -> (..., N) in x's dtype. ŵ is rounded from fp32 to x's dtype, once."""
    check_impl("fake_quant_linear", impl, x.device)
    check_floats("fake_quant_linear", x=x, w=w)
    check_linear("fake_quant_linear", x, w)
    options = dict(
        bits=bits, clip=clip, code_range=code_range, scale_dtype=scale_dtype, scale_floor=scale_floor,
        codes_from=codes_from, group_size=group_size,
    )  # fmt: skip
    _check("fake_quant_linear", w, **options)
    return fake_quant_linear_ref(x, w, **options)


def _check(op, w, *, bits, clip, code_range, scale_dtype, scale_floor, codes_from, group_size) -> None:
    check_floats(op, w=w)
    if w.ndim < 2 or w.shape[-1] == 0:
        raise ValueError(f"{op}: w has shape {tuple(w.shape)}; possible: (..., rows, cols) with cols >= 1")
    if bits not in range(2, 9):
        raise ValueError(f"{op}: bits={bits}; possible: 2 to 8")
    for name, value, possible in (
        ("clip", clip, ("max", "quantile")),
        ("code_range", code_range, ("symmetric", "full")),
        ("scale_dtype", scale_dtype, FLOAT_DTYPES),
        ("codes_from", codes_from, ("stored_scale", "float32_scale")),
    ):
        if value not in possible:
            raise ValueError(f"{op}: {name}={value!r}; possible: {possible}")
    if not 0 <= scale_floor <= torch.finfo(scale_dtype).max:
        raise ValueError(f"{op}: scale_floor={scale_floor}; possible: 0 to {torch.finfo(scale_dtype).max}")
    _check_group(op, w, group_size)
    if clip == "quantile" and (group_size or w.shape[-1]) > _QUANTILE_MAX_COLS:
        raise ValueError(f"{op}: clip='quantile' with {w.shape[-1]} columns; possible: up to {_QUANTILE_MAX_COLS}")
    if values_readable(w) and not torch.isfinite(w).all():
        index = (~torch.isfinite(w)).nonzero()[0].tolist()
        raise ValueError(f"{op}: w{index} = {w[tuple(index)].item()}; possible: finite weights")


def _check_group(op: str, w: Tensor, group_size: int | None) -> None:
    if group_size is not None and (group_size < 1 or w.shape[-1] % group_size):
        raise ValueError(f"{op}: group_size={group_size}; possible: None or a divisor of {w.shape[-1]} columns")
