"""The row quantizer's options and arithmetic, in PyTorch and on a tile in registers, and kernels over many matrices.

Matrices come as tuples of pointers; the program finds its own among ranges of blocks, in a branch that is
compiled for the columns of that matrix. A block is BLOCK // WIDTH rows of WIDTH columns, WIDTH the power of
two that holds a row, BLOCK at most. fake_quant.py, whose op it is, explains the arithmetic; the Muon step writes its
compute copies with it too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ._dispatch import FLOAT_DTYPES, KERNEL_DTYPES, Impl, accumulate_dtype
from ._jit import ceil_div, jit, narrow, tl
from ._tiles import TileTable

CLIP_QUANTILE = 0.9999984
_QUANTILE_MAX_COLS = 500_000  # from 625,000 columns on the rank lies below the second largest magnitude


# ---- options


@dataclass(frozen=True, kw_only=True)
class RowQuant:
    """How rows become codes and scales; fake_quant.py has the equations. Raises ValueError for an option out of range.

    dataclasses.replace(spec, bits=5) makes a variant.
    """

    bits: int
    """2 to 8."""
    clip: Literal["max", "quantile", "deviation"] = "max"
    """Clip magnitude of a row: its maximum, torch.quantile(|w|, 0.9999984), or `deviations` standard deviations."""
    deviations: float = 0.0
    """For clip="deviation"; 0 with any other."""
    code_range: Literal["symmetric", "full"] = "symmetric"
    """Codes from -qmax, or from -qmax - 1; both to qmax."""
    scale_dtype: torch.dtype = torch.float16
    """Of the stored scale. Kernels store no float64."""
    scale_floor: float = 0.0
    """The least scale, in the weights' units."""
    codes_from: Literal["stored_scale", "float32_scale"] = "stored_scale"
    """The scale that codes divide by: as stored, or before that rounding."""
    group_size: int | None = None
    """Neighbouring columns with a scale of their own, a divisor of the columns; None: the row."""

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"RowQuant: bits={self.bits}; expected 2 to 8")
        for name, expected in (
            ("clip", ("max", "quantile", "deviation")),
            ("code_range", ("symmetric", "full")),
            ("scale_dtype", FLOAT_DTYPES),
            ("codes_from", ("stored_scale", "float32_scale")),
        ):
            if (value := getattr(self, name)) not in expected:
                raise ValueError(f"RowQuant: {name}={value!r}; expected one of {expected}")
        largest = torch.finfo(self.scale_dtype).max
        if not 0 <= self.scale_floor <= largest:
            raise ValueError(f"RowQuant: scale_floor={self.scale_floor}; expected 0 to {largest}")
        if (self.deviations > 0) != (self.clip == "deviation") or not self.deviations < float("inf"):
            raise ValueError(
                f"RowQuant: deviations={self.deviations} with clip={self.clip!r}; expected a positive number with "
                "clip='deviation' and 0 with any other"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"RowQuant: group_size={self.group_size}; expected None or columns, at least 1")

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1


def check_rows(op: str, name: str, w: Tensor, spec: RowQuant) -> None:
    """ValueError unless the rows of w, which the caller knows by `name`, can be quantized so."""
    if not isinstance(spec, RowQuant):
        raise ValueError(f"{op}: spec={spec!r} for {name}; expected a RowQuant")
    if w.ndim < 2 or w.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(w.shape)}; expected (..., rows, cols) with cols >= 1")
    check_group(op, w, spec.group_size)
    cols = spec.group_size or w.shape[-1]
    if spec.clip == "deviation" and cols < 2:
        raise ValueError(f"{op}: clip='deviation' of {name} with rows of one column, which have none; choose another")
    if spec.clip == "quantile" and cols > _QUANTILE_MAX_COLS:
        raise ValueError(f"{op}: clip='quantile' with {cols} columns; expected up to {_QUANTILE_MAX_COLS}")


def check_group(op: str, w: Tensor, group_size: int | None) -> None:
    if group_size is not None and (group_size < 1 or w.shape[-1] % group_size):
        raise ValueError(f"{op}: group_size={group_size}; expected None or a divisor of {w.shape[-1]} columns")


def stores_scale(op: str, impl: Impl, spec: RowQuant) -> bool:
    """Whether kernels store such scales; RuntimeError if impl="triton" asks for what they do not."""
    if impl == "triton" and spec.scale_dtype not in KERNEL_DTYPES:
        raise RuntimeError(
            f"{op}: impl='triton' cannot run: it stores no scale in {spec.scale_dtype}; impl='eager' can"
        )
    return spec.scale_dtype in KERNEL_DTYPES


# ---- options of many matrices, and at the border of custom ops


def one_each(op: str, specs: Any, count: int) -> list:
    """`specs` as a list: one for each of `count` matrices, or one for all of them."""
    specs = list(specs) if isinstance(specs, Sequence) else [specs] * count
    if len(specs) != count:
        raise ValueError(f"{op}: {len(specs)} specs for {count} matrices; expected one for all or one each")
    return specs


def by_launch(specs: Sequence[RowQuant | None]) -> list[list[int]]:
    """Indices of the matrices of each launch, whose specs differ in bits only; in the order of their first matrix."""
    launches: dict[Any, list[int]] = {}
    for i, spec in enumerate(specs):
        launches.setdefault(None if spec is None else replace(spec, bits=8), []).append(i)
    return list(launches.values())


SPEC_SCHEMA = (
    "int[] bits, str clip, float deviations, str code_range, ScalarType scale_dtype, float scale_floor, "
    "str codes_from, int? group_size"
)


_SHARED_FIELDS = tuple(f.name for f in fields(RowQuant) if f.name != "bits")  # torch 2.10 cannot trace vars(spec)


def to_fields(specs: Sequence[RowQuant]) -> dict[str, Any]:
    """Specs of one launch as the keyword arguments SPEC_SCHEMA of a custom op, which takes no dataclasses."""
    return {"bits": [spec.bits for spec in specs]} | {name: getattr(specs[0], name) for name in _SHARED_FIELDS}


def from_fields(bits: Sequence[int], **fields: Any) -> list[RowQuant]:
    return [RowQuant(bits=n, **fields) for n in bits]


# ---- the reference


def quantize_rows_ref(w: Tensor, spec: RowQuant) -> tuple[Tensor, Tensor]:
    rows = w.to(accumulate_dtype(w.dtype)).contiguous()
    if spec.group_size is not None:
        rows = rows.unflatten(-1, (-1, spec.group_size))
    c = _clip_magnitude(rows, spec).unsqueeze(-1)
    # Divided by a tensor: CUDA turns division by a number into multiplication by its rounded reciprocal.
    s = (c / torch.full_like(c, spec.qmax)).clamp(min=spec.scale_floor)
    s = _representable(s, spec.scale_dtype, up=spec.clip != "deviation")
    if spec.clip == "deviation":
        c = torch.full_like(c, float("inf"))
    scale = s.to(spec.scale_dtype)
    s = scale.to(s.dtype) if spec.codes_from == "stored_scale" else s
    codes = torch.round(rows.clamp(-c, c) / s).clamp(-spec.qmax - (spec.code_range == "full"), spec.qmax)
    return codes.to(torch.int8).reshape(w.shape), scale.squeeze(-1)


def fake_quantize_rows_ref(
    w: Tensor, spec: RowQuant, *, dtype: torch.dtype | None = None, enabled: Tensor | None = None
) -> Tensor:
    w_hat = decode_rows(*quantize_rows_ref(w, spec), dtype or w.dtype, spec.group_size)
    return w_hat if enabled is None else torch.where(enabled, w_hat, w.to(w_hat.dtype))


def _clip_magnitude(rows: Tensor, spec: RowQuant) -> Tensor:
    if spec.clip == "deviation":  # in float64, so that no order of the sums shows in the scale
        cols, wide = rows.shape[-1], rows.double()
        mean_square = wide.square().sum(-1) / cols
        variance = mean_square - (wide.sum(-1) / cols).square()
        # Less is a row of equal weights, and rounding errors.
        variance = torch.where(variance > 1e-12 * mean_square, variance, 0.0) * (cols / (cols - 1))
        return variance.sqrt().to(rows.dtype) * spec.deviations
    magnitude = rows.abs()
    if spec.clip == "max":
        return magnitude.amax(dim=-1)
    cols = magnitude.shape[-1]
    top = magnitude.topk(min(2, cols), dim=-1).values
    rank = torch.full((), CLIP_QUANTILE, dtype=torch.float32, device=magnitude.device) * (cols - 1)
    return torch.lerp(top[..., -1], top[..., 0], (rank - rank.floor()).to(magnitude.dtype))


def _representable(s: Tensor, dtype: torch.dtype, up: bool) -> Tensor:
    """s moved into the positive finite numbers of `dtype`; see "Range of the stored scale" in fake_quant.py."""
    info = torch.finfo(dtype)
    step = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    if up:
        s = torch.where(s < info.tiny, torch.ceil(s / step) * step, s)
    return s.clamp(min=step, max=info.max)


def decode_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype, group_size: int | None) -> Tensor:
    """codes × scale in fp32 (float64 for a float64 scale), rounded once to `dtype`."""
    rows = codes if group_size is None else codes.unflatten(-1, (-1, group_size))
    scale = scale.to(accumulate_dtype(scale.dtype)).unsqueeze(-1)
    return (rows.to(scale.dtype) * scale).to(dtype).reshape(codes.shape)


# ---- arguments of a launch


def row_arguments(
    matrices: Sequence[Tensor], specs: Sequence[RowQuant], tiles: TileTable, tile: dict | None
) -> tuple[int, tuple, dict]:
    """(programs, runtime arguments, keywords) of a launch over rows of matrices whose specs differ in bits only.

    Blocks starts[i] to starts[i + 1] are matrix i. Runtime arguments are starts; of each matrix the number of rows,
    qmax and the quantile's fraction or the deviations; the floor. A group of columns is a row of its own. `tile` None:
    by the table.
    """
    spec = specs[0]
    cols = tuple(spec.group_size or matrix.shape[-1] for matrix in matrices)
    rows = tuple(matrix.numel() // n for matrix, n in zip(matrices, cols, strict=True))
    tile = tile or tiles.select(matrices[0].device, matrices[0].dtype, max(cols))
    widths = tuple(min(1 << (n - 1).bit_length(), tile["BLOCK"]) for n in cols)
    blocks = (ceil_div(n, tile["BLOCK"] // width) for n, width in zip(rows, widths, strict=True))
    starts = (0, *itertools.accumulate(blocks))
    ranks = [torch.full((), CLIP_QUANTILE, dtype=torch.float32, device="cpu") * (n - 1) for n in cols]
    deviation = spec.clip == "deviation"
    fractions = tuple(spec.deviations if deviation else float(rank - rank.floor()) for rank in ranks)
    info = torch.finfo(spec.scale_dtype)
    keywords = {
        "COLS": cols,
        "WIDTH": widths,
        "CLIP": {"max": 0, "quantile": 1, "deviation": 2}[spec.clip],
        "FULL": spec.code_range == "full",
        "STORED": spec.codes_from == "stored_scale",
        "SCALE": {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[spec.scale_dtype],
        "TINY": info.tiny,
        "STEP": info.tiny * info.eps if spec.scale_dtype == torch.float16 else info.tiny,
        "MAX": info.max,
        "enable_fp_fusion": False,  # codes must equal the reference's
        **tile,
    }
    numbers = starts, rows, tuple(float(each.qmax) for each in specs), fractions, float(spec.scale_floor)
    return starts[-1], numbers, keywords


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
def row_statistics(w, COLS: tl.constexpr, CLIP: tl.constexpr):
    """Two numbers of each row of a tile from which its clip magnitude follows: the two largest magnitudes, or the sum
    and the sum of squares in float64."""
    if CLIP == 2:
        wide = w.to(tl.float64)
        first, second = tl.sum(wide, axis=1), tl.sum(wide * wide, axis=1)
    else:
        first, second = _two_largest(tl.abs(w), COLS)
    return first, second


@jit
def joined_statistics(first, second, other_first, other_second, CLIP: tl.constexpr):
    """The same of rows that come in two parts."""
    if CLIP == 2:
        second += other_second
        first += other_first
    else:
        second = tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))
        first = tl.maximum(first, other_first)
    return first, second


@jit
def clip_magnitude(first, second, option, COLS: tl.constexpr, CLIP: tl.constexpr):
    """Clip magnitudes of rows of COLS columns, fp32. `option`: the quantile's fraction, or the deviations."""
    if CLIP == 0:
        c = first
    elif CLIP == 1:
        c = _interpolate(first, second, option)
    else:
        mean_square = second / COLS
        variance = mean_square - (first / COLS) * (first / COLS)
        variance = tl.where(variance > 1e-12 * mean_square, variance, 0.0) * (COLS / (COLS - 1))
        c = tl.sqrt(variance).to(tl.float32) * option
    return c


@jit
def _two_largest(magnitude, COLS: tl.constexpr):
    """Largest and second largest of each row of (rows, columns), equal to the largest where that comes twice."""
    first = tl.max(magnitude, axis=1)
    largest = magnitude == first[:, None]
    below = tl.max(tl.where(largest, 0.0, magnitude), axis=1)
    alone = (tl.sum(largest.to(tl.int32), axis=1) == 1) & (COLS > 1)
    return first, tl.where(alone, below, first)


@jit
def _interpolate(first, second, fraction):
    """torch.lerp(second, first, fraction), whose multiply-add is fused: two fp32 factors are exact in float64."""
    near = fraction >= 0.5
    weight = tl.where(near, fraction - 1, fraction).to(tl.float64)
    base = tl.where(near, first, second).to(tl.float64)
    return (weight * (first - second).to(tl.float64) + base).to(tl.float32)


@jit
def stored_scale(
    c, qmax, floor, CLIP: tl.constexpr, DTYPE: tl.constexpr, TINY: tl.constexpr, STEP: tl.constexpr, MAX: tl.constexpr
):
    """The fp32 scale moved into DTYPE's positive finite range, and what DTYPE stores of it."""
    s = tl.maximum(tl.div_rn(c, tl.zeros_like(c) + qmax), floor)
    if CLIP != 2:  # STEP is a power of two, so both products are exact
        s = tl.where(s < TINY, tl.ceil(tl.minimum(s, TINY) * (1 / STEP)) * STEP, s)
    s = tl.minimum(tl.maximum(s, STEP), MAX)
    return s, narrow(s, DTYPE)


@jit
def row_codes(w, c, s, qmax, FULL: tl.constexpr, CLIP: tl.constexpr):
    """Codes, whole numbers in fp32, of a tile w with clip magnitude c and scale s per row."""
    if CLIP != 2:
        w = tl.minimum(tl.maximum(w, -c[:, None]), c[:, None])
    q = tl.div_rn(w, tl.zeros_like(w) + s[:, None])
    q = tl.minimum(tl.maximum(q, -512.0), 512.0)
    q = (q + 12582912.0) - 12582912.0  # 1.5 x 2^23: rounds half to even
    return tl.minimum(tl.maximum(q, -qmax - 1 if FULL else -qmax), qmax)
