"""Weight gradient of a linear layer:  dW = dyᵀ x, summed over many rows.

dy (M, N), x (M, K) -> dW (N, K), accumulated in fp32 and rounded once, to the dtype of the weight and not of
the activations, so a fp32 master weight gets a fp32 gradient from bf16 operands.

M is the long axis, 65,536 rows for a dW of 1536 x 512: one program per tile of dW would leave most of 132
multiprocessors idle (24 tiles of 128 x 256). M is split into ranges of rows whose fp32 partial sums go to
memory and are added in a fixed order: deterministic, without atomics or locks. The splits depend on the
shape and the number of multiprocessors only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._jit import ceil_div, descriptor, dot, dot_precision, jit, launch, num_programs, tl
from ._ops import add_op_namespace_prefix
from ._tiles import INTERPRETED_GEMM, Tile, TileTable

_DW_TILES = TileTable(
    "weight_grad",
    "rows",
    *INTERPRETED_GEMM,
    Tile(sm=80, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
    Tile(sm=80, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}),
    Tile(sm=90, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
    Tile(sm=90, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}),
)


@jit
def _weight_grad_kernel(
    dy_desc, x_desc, partial_ptr,
    M, N, K, rows_per_split,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial (splits, N, K) in fp32: dyᵀ x over rows_per_split rows each, a multiple of BLOCK_K, the step along M."""
    tiles_k = tl.cdiv(K, BLOCK_N)
    tiles = tl.cdiv(N, BLOCK_M) * tiles_k
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = tile // tiles_k * BLOCK_M
    k = tile % tiles_k * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = split * rows_per_split
    for m in tl.range(begin, tl.minimum(begin + rows_per_split, M), BLOCK_K):
        acc = dot(dy_desc.load([m, n]).T, x_desc.load([m, k]), acc, PRECISION)
    offs_n = n + tl.arange(0, BLOCK_M)[:, None]
    offs_k = k + tl.arange(0, BLOCK_N)[None, :]
    offs = (split.to(tl.int64) * N + offs_n) * K + offs_k
    tl.store(partial_ptr + offs, acc, mask=(offs_n < N) & (offs_k < K))


def num_splits(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, tile: Mapping | None = None) -> int:
    """How many partial sums `weight_grad_parts` makes of dy (m, n) and x (m, k)."""
    tile = tile or _DW_TILES.select(device, dtype, m)
    tiles = ceil_div(n, tile["BLOCK_M"]) * ceil_div(k, tile["BLOCK_N"])
    blocks = ceil_div(m, tile["BLOCK_K"])
    # One wave of programs; a range of fewer than four blocks would be more prologue and partial sums than matmul.
    splits = max(1, min(num_programs(device) // max(1, tiles), blocks // 4))
    return max(1, ceil_div(blocks, max(1, ceil_div(blocks, splits))))


def weight_grad_parts(dy: Tensor, x: Tensor, out: Tensor | None = None, tile: Mapping | None = None) -> Tensor:
    """Partial sums (splits, N, K) of dyᵀ x, dy (M, N) and x (M, K), in fp32; into `out` with as many splits as it
    has."""
    (m, n), k = dy.shape, x.shape[1]
    tile = tile or _DW_TILES.select(x.device, x.dtype, m)
    if out is None:
        out = x.new_empty((num_splits(m, n, k, x.device, x.dtype, tile), n, k), dtype=torch.float32)
    bm, bn, bk = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    tiles = ceil_div(n, bm) * ceil_div(k, bn)
    if m == 0 or tiles == 0:
        return out.zero_()
    rows_per_split = ceil_div(ceil_div(m, bk), len(out)) * bk
    operands = descriptor(dy, (bk, bm)), descriptor(x, (bk, bn)), out
    options = m, n, k, rows_per_split, dot_precision(x.dtype)
    launch(_weight_grad_kernel, (tiles * len(out),), x.device, *operands, *options, **tile)
    return out


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of partial sums (splits, ...), rounded once to `dtype`. Part of the traced graph and not of an op: sum,
    cast and what stacks the gradients of layers are then one kernel."""
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(dtype)


@torch.library.custom_op(add_op_namespace_prefix("weight_grad_parts"), mutates_args=())
def _weight_grad_parts(dy: Tensor, x: Tensor) -> Tensor:
    return weight_grad_parts(dy, x)


@_weight_grad_parts.register_fake
def _(dy, x):
    (m, n), k = dy.shape, x.shape[1]
    return x.new_empty((num_splits(m, n, k, x.device, x.dtype), n, k), dtype=torch.float32)


def weight_grad(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dyᵀ x (N, K) of dy (M, N) and x (M, K), accumulated in fp32 and rounded once to `dtype`."""
    return add_parts(_weight_grad_parts(dy, x), dtype)
