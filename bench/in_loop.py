"""The fake-quantized linear layer that is not in the package, so that its cost is measured and not assumed.

Each program quantizes its tile of the fp32 master in every step of the k loop, so that ŵ never exists in memory, and
every block of rows does all of it again.
"""

from __future__ import annotations

import math

from golfgpt_kernels._cases import INT6
from golfgpt_kernels._jit import descriptor, dot, dot_precision, empty_rows, jit, launch, narrow, num_programs, tl
from golfgpt_kernels._tiles import compute_capability
from golfgpt_kernels.fake_quant import quantize_rows
from torch import Tensor

# By least compute capability, 0 the interpreter. The tallest that compile without spills (192 registers and 156 KB for
# sm_90, triton 3.7.1), since every block of rows quantizes the whole weight.
TILES = {0: (32, 32, 32, 4, 1), 80: (128, 128, 32, 8, 4), 90: (256, 128, 32, 8, 3)}


@jit
def _in_loop_kernel(
    x_desc, w_desc, scale_ptr, y_desc,
    M, N, K, qmax,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x ŵᵀ with x (M, K), w (N, K) in fp32 and one scale per row of w. Codes as the quantizer's, bit for
    bit: true division and half to even, hence enable_fp_fusion=False."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0)):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * BLOCK_N
        offs_n = n + tl.arange(0, BLOCK_N)
        scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=1).to(tl.float32)[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            w = w_desc.load([n, k])
            q = tl.div_rn(w, tl.zeros_like(w) + scale)
            q = (tl.minimum(tl.maximum(q, -512.0), 512.0) + 12582912.0) - 12582912.0  # 1.5 x 2^23: half to even
            q = tl.minimum(tl.maximum(q, -qmax), qmax)
            acc = dot(x_desc.load([m, k]), narrow(q * scale, x_desc.dtype).T, acc, PRECISION)
        y_desc.store([m, n], narrow(acc, y_desc.dtype))


def in_loop_linear(x: Tensor, w: Tensor) -> Tensor:
    scale = quantize_rows(w, INT6, impl="triton")[1]
    (m, k), n = x.shape, w.shape[0]
    y = empty_rows((m, n), x.dtype, x.device)
    sm = compute_capability(x.device)
    block_m, block_n, block_k, warps, stages = TILES[max(least for least in TILES if least <= sm)]
    grid = (min(num_programs(x.device), math.ceil(m / block_m) * math.ceil(n / block_n)),)
    operands = descriptor(x, (block_m, block_k)), descriptor(w, (block_n, block_k)), scale
    launch(
        _in_loop_kernel, grid, x.device, *operands, descriptor(y, (block_m, block_n)),
        m, n, k, float(INT6.qmax), dot_precision(x.dtype), block_m, block_n, block_k,
        num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y
