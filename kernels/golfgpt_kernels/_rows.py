"""Kernels over the rows of many matrices in one launch, and the row quantizer's arithmetic on a tile in registers.

Matrices come as tuples of pointers; the program finds its own among ranges of blocks, in a branch that is
compiled for the columns of that matrix. A block is BLOCK // WIDTH rows of WIDTH columns, WIDTH the power of
two that holds a row, BLOCK at most. What the arithmetic means is said in fake_quant.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._jit import jit, narrow, tl

CLIP_QUANTILE = 0.9999984


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
