"""The row quantizer's arithmetic, in PyTorch and on a tile in registers, and kernels over the rows of many matrices.

Matrices come as tuples of pointers; the program finds its own among ranges of blocks, in a branch that is
compiled for the columns of that matrix. A block is BLOCK // WIDTH rows of WIDTH columns, WIDTH the power of
two that holds a row, BLOCK at most. What the arithmetic means is said in fake_quant.py, whose op it is; the
Muon step's shadows are written with it too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dispatch import FLOAT_DTYPES, accumulate_dtype
from ._jit import jit, narrow, tl

CLIP_QUANTILE = 0.9999984
_QUANTILE_MAX_COLS = 500_000  # from 625,000 columns on the rank lies below the second largest magnitude


# ---- the reference


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
    # Divided by a tensor: CUDA turns division by a number into multiplication by its rounded reciprocal.
    s = _representable((c / torch.full_like(c, qmax)).clamp(min=scale_floor), scale_dtype)
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
    """s moved into the positive finite numbers of `dtype`; see "Range of the stored scale" in fake_quant.py."""
    info = torch.finfo(dtype)
    step = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    s = torch.where(s < info.tiny, torch.ceil(s / step) * step, s)
    return s.clamp(min=step, max=info.max)


def decode_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype, group_size: int | None) -> Tensor:
    """codes × scale in fp32 (float64 for a float64 scale), rounded once to `dtype`."""
    rows = codes if group_size is None else codes.unflatten(-1, (-1, group_size))
    scale = scale.to(accumulate_dtype(scale.dtype)).unsqueeze(-1)
    return (rows.to(scale.dtype) * scale).to(dtype).reshape(codes.shape)


def check_row_options(
    op, name, w, *, bits, clip, code_range, scale_dtype, scale_floor, codes_from, group_size
) -> None:  # fmt: skip
    """ValueError unless the rows of w, which the caller knows by `name`, can be quantized so."""
    if w.ndim < 2 or w.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(w.shape)}; possible: (..., rows, cols) with cols >= 1")
    if not isinstance(bits, int) or bits not in range(2, 9):
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
    check_group(op, w, group_size)
    if clip == "quantile" and (group_size or w.shape[-1]) > _QUANTILE_MAX_COLS:
        raise ValueError(f"{op}: clip='quantile' with {w.shape[-1]} columns; possible: up to {_QUANTILE_MAX_COLS}")


def check_group(op: str, w: Tensor, group_size: int | None) -> None:
    if group_size is not None and (group_size < 1 or w.shape[-1] % group_size):
        raise ValueError(f"{op}: group_size={group_size}; possible: None or a divisor of {w.shape[-1]} columns")


# ---- rows and constants of a launch


@dataclass(frozen=True)
class RowBlocks:
    """How the rows of several matrices are dealt to programs: blocks starts[i] to starts[i + 1] are matrix i."""

    starts: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, matrices: Sequence[Tensor], cols: Sequence[int], block: int) -> RowBlocks:
        """Matrices (..., cols) that are not empty; `cols` divides their last dimension where rows are cut in groups."""
        rows = tuple(matrix.numel() // n for matrix, n in zip(matrices, cols, strict=True))
        widths = tuple(min(1 << (n - 1).bit_length(), block) for n in cols)
        counts = (-(-count // (block // width)) for count, width in zip(rows, widths, strict=True))
        return cls((0, *itertools.accumulate(counts)), rows, tuple(cols), widths)


def row_constants(
    cols: Sequence[int],
    bits: Sequence[int],
    clip: str,
    code_range: str,
    scale_dtype: torch.dtype,
    scale_floor: float,
    codes_from: str,
) -> tuple[tuple, dict]:
    """Runtime arguments (qmax and the quantile's fraction per matrix, the floor), and constexprs, of the quantizer."""
    ranks = [torch.full((), CLIP_QUANTILE, dtype=torch.float32, device="cpu") * (n - 1) for n in cols]
    info = torch.finfo(scale_dtype)
    numbers = (
        tuple(float(2 ** (n - 1) - 1) for n in bits),
        tuple(float(rank - rank.floor()) for rank in ranks),
        float(scale_floor),
    )
    return numbers, {
        "QUANTILE": clip == "quantile",
        "FULL": code_range == "full",
        "STORED": codes_from == "stored_scale",
        "SCALE": getattr(tl, str(scale_dtype).removeprefix("torch.")),
        "TINY": info.tiny,
        "STEP": info.tiny * info.eps if scale_dtype == torch.float16 else info.tiny,
        "MAX": info.max,
    }


# ---- a tile in registers


@jit
def row_offsets(rows, offs_r, start, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """(offsets, mask) of columns start to start + WIDTH of the rows offs_r."""
    offs_c = start + tl.arange(0, WIDTH)
    mask = (offs_r < rows)[:, None] & (offs_c < COLS)[None, :]
    return offs_r.to(tl.int64)[:, None] * COLS + offs_c[None, :], mask


@jit
def load_rows(ptr, rows, offs_r, start, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """That tile in fp32, zero outside."""
    offs, mask = row_offsets(rows, offs_r, start, COLS, WIDTH)
    return tl.load(ptr + offs, mask=mask, other=0).to(tl.float32)


@jit
def two_largest(magnitude, COLS: tl.constexpr):
    """Largest and second largest of each row of (rows, columns), equal to the largest where that comes twice."""
    first = tl.max(magnitude, axis=1)
    largest = magnitude == first[:, None]
    below = tl.max(tl.where(largest, 0.0, magnitude), axis=1)
    alone = (tl.sum(largest.to(tl.int32), axis=1) == 1) & (COLS > 1)
    return first, tl.where(alone, below, first)


@jit
def two_largest_of_both(first, second, other_first, other_second):
    """The same of rows that come in two parts."""
    return tl.maximum(first, other_first), tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))


@jit
def interpolate(first, second, fraction, QUANTILE: tl.constexpr):
    """torch.lerp(second, first, fraction), whose multiply-add is fused: two fp32 factors are exact in float64."""
    if not QUANTILE:
        return first
    near = fraction >= 0.5
    weight = tl.where(near, fraction - 1, fraction).to(tl.float64)
    base = tl.where(near, first, second).to(tl.float64)
    return (weight * (first - second).to(tl.float64) + base).to(tl.float32)


@jit
def stored_scale(c, qmax, floor, DTYPE: tl.constexpr, TINY: tl.constexpr, STEP: tl.constexpr, MAX: tl.constexpr):
    """The fp32 scale moved into DTYPE's positive finite range, and what DTYPE stores of it."""
    s = tl.maximum(tl.div_rn(c, tl.zeros_like(c) + qmax), floor)
    # STEP is a power of two, so both products are exact.
    s = tl.where(s < TINY, tl.ceil(tl.minimum(s, TINY) * (1 / STEP)) * STEP, s)
    s = tl.minimum(tl.maximum(s, STEP), MAX)
    return s, narrow(s, DTYPE)


@jit
def row_codes(w, c, s, qmax, FULL: tl.constexpr):
    """Codes, whole numbers in fp32, of a tile w with clip magnitude c and scale s per row."""
    clipped = tl.minimum(tl.maximum(w, -c[:, None]), c[:, None])
    q = tl.div_rn(clipped, tl.zeros_like(w) + s[:, None])
    q = tl.minimum(tl.maximum(q, -512.0), 512.0)
    q = (q + 12582912.0) - 12582912.0  # 1.5 x 2^23: rounds half to even
    return tl.minimum(tl.maximum(q, -qmax - 1 if FULL else -qmax), qmax)
