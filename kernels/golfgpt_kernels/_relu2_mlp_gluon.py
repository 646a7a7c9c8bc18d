"""The two GEMMs of the relu² MLP with specialised warps, in Gluon, for sm_90 in fp16 and bf16. Compiled, never run.

    up:  h = relu(x wᵀ)²          x (M, K), w (N, K) -> h (M, N)
    dz:  dz = 2 a a' (dy w)       dy (M, K), w (K, N), h (M, N) -> dz (M, N)

as `linear_relu2_fwd` and `relu2_mlp_dz` of relu2_mlp.py, from where what follows the matmul is taken, so that either
form's dz reads either form's h.

A program computes tiles of 128 x 256, one after another, with 9 warps: two consumers of 4 warps, each with 64 rows of
the tile in 128 fp32 registers a thread, and a producer of one warp, which alone loads. It runs ahead of the consumers
as far as the ring of three slots lets it, also over the end of a tile. A slot holds one step of K: the 64 rows of A of
each consumer, and the B that they share. Of the mbarriers

    full[slot]    ends a phase when the loads of a step have arrived: one arrival, with their bytes;
    empty[slot]   when both consumers have multiplied it: two arrivals;
    h_free[half]  in each tile, when what the consumer stored last has left its buffer: h may come there;
    h_full[half]  in each tile, when h is there.

A wait names a phase by its parity and returns once that phase has ended. The phase before the first counts as ended, by
which the producer finds an unused ring free. dz leaves from the buffer into which its h came. The load of h is issued
behind those of the tile's last step, when at least 2 of the 3 slots are still to be multiplied.

Edges: beyond a matrix TMA reads zeros, whose bytes it counts too, and writes nothing.

tests/test_relu2_gluon.py runs this source with threads over a model of barriers and copies.

Sources: Triton's Gluon tutorials (warp specialisation, persistence); the cooperative kernel of CUTLASS for sm_90.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon import jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._jit import ceil_div, descriptor, empty_rows, halves, launch, num_programs
from .relu2_mlp import _activate, _activation_grad

# triton 3.6 and 3.7 have only the longer names.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

activate, activation_grad, halves = jit(_activate.fn), jit(_activation_grad.fn), jit(halves.fn)

ROWS, BLOCK_N, BLOCK_K = gl.constexpr(64), gl.constexpr(256), gl.constexpr(64)  # rows of a consumer, half a tile's
SLOTS = gl.constexpr(3)  # 3 x 48 KB and 64 KB of h or output: 208 of 227 KB
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
HALF_SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))


@jit
def _produce(a_desc, b_desc, h_desc, a, b, out, full, empty, h_free, h_full, M, N, K, GRAD: gl.constexpr):
    tiles_n = gl.cdiv(N, BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, 2 * ROWS) * tiles_n, gl.num_programs(0)):
        turn = tile // gl.num_programs(0)
        m = tile // tiles_n * (2 * ROWS)
        n = tile % tiles_n * BLOCK_N
        for k in range(0, K, BLOCK_K):
            slot = step % SLOTS
            mbarrier.wait(empty.index(slot), (step // SLOTS + 1) & 1)
            mbarrier.expect(full.index(slot), 2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma_load(a_desc, [m, k], full.index(slot), a.index(2 * slot))
            tma_load(a_desc, [m + ROWS, k], full.index(slot), a.index(2 * slot + 1))
            if GRAD:
                tma_load(b_desc, [k, n], full.index(slot), b.index(slot))
            else:
                tma_load(b_desc, [n, k], full.index(slot), b.index(slot))
            step += 1
        if GRAD:
            for half in gl.static_range(2):
                mbarrier.wait(h_free.index(half), turn & 1)
                mbarrier.expect(h_full.index(half), h_desc.block_type.nbytes)
                tma_load(h_desc, [m + half * ROWS, n], h_full.index(half), out.index(half))


@jit
def _multiply_grad(h, sums, slope, LEAKY: gl.constexpr):
    """h = sums 2 a a', in place."""
    sums = gl.convert_layout(sums, HALF_SUMS, assert_trivial=True)
    h.store((sums * activation_grad(h.load(HALF_SUMS), slope, LEAKY)).to(h.dtype))


@jit
def _consume(
    half, out_desc, a, b, out, full, empty, h_free, h_full, slope, M, N, K, GRAD: gl.constexpr, LEAKY: gl.constexpr
):
    tiles_n = gl.cdiv(N, BLOCK_N)
    buffer = out.index(half)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, 2 * ROWS) * tiles_n, gl.num_programs(0)):
        turn = tile // gl.num_programs(0)
        m = tile // tiles_n * (2 * ROWS) + half * ROWS
        n = tile % tiles_n * BLOCK_N
        sums = gl.zeros((ROWS, BLOCK_N), gl.float32, SUMS)
        for k in range(0, K, BLOCK_K):
            slot = step % SLOTS
            mbarrier.wait(full.index(slot), step // SLOTS & 1)
            if GRAD:
                right = b.index(slot)
            else:
                right = b.index(slot).permute((1, 0))
            sums = warpgroup_mma(a.index(2 * slot + half), right, sums)  # waits for its result
            mbarrier.arrive(empty.index(slot), count=1)
            if k == 0:  # the store of the tile before had this step's time to leave
                tma.store_wait(0)
                if GRAD:
                    mbarrier.arrive(h_free.index(half), count=1)
            step += 1
        if GRAD:
            mbarrier.wait(h_full.index(half), turn & 1)
            left, right = halves(sums, ROWS, BLOCK_N)  # h whole takes 64 registers: LEAKY spills in triton 3.7
            _multiply_grad(buffer.slice(0, BLOCK_N // 2, dim=1), left, slope, LEAKY)
            _multiply_grad(buffer.slice(BLOCK_N // 2, BLOCK_N // 2, dim=1), right, slope, LEAKY)
        else:
            buffer.store(activate(sums, slope, out_desc.dtype, LEAKY))
        fence_async_shared()
        tma_store(out_desc, [m, n], buffer)
    tma.store_wait(0)


@jit
def _relu2_mlp_gluon_kernel(
    a_desc, b_desc, h_desc, out_desc, slope,
    M, N, K,
    GRAD: gl.constexpr, LEAKY: gl.constexpr,
):  # fmt: skip
    """GRAD: dz of dy, w, h; else h of x and w, with any descriptor for h."""
    dtype: gl.constexpr = out_desc.dtype
    a = gl.allocate_shared_memory(dtype, [2 * SLOTS, ROWS, BLOCK_K], SHARED)
    if GRAD:
        b = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_K, BLOCK_N], SHARED)
    else:
        b = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, BLOCK_K], SHARED)
    out = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_N], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    h_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    h_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    for half in gl.static_range(2):
        mbarrier.init(h_free.index(half), count=1)
        mbarrier.init(h_full.index(half), count=1)
    fence_async_shared()  # TMA sees the barriers
    gl.warp_specialize(
        [
            (_consume, (0, out_desc, a, b, out, full, empty, h_free, h_full, slope, M, N, K, GRAD, LEAKY)),
            (_consume, (1, out_desc, a, b, out, full, empty, h_free, h_full, slope, M, N, K, GRAD, LEAKY)),
            (_produce, (a_desc, b_desc, h_desc, a, b, out, full, empty, h_free, h_full, M, N, K, GRAD)),
        ],
        [4, 1],
        [240, 24],  # registers a thread of the second consumer and of the producer; the first one gets the rest, 240
    )


def _launch(a: Tensor, b: Tensor, h: Tensor | None, n: int, slope: float) -> Tensor:
    (m, k), grad = a.shape, h is not None
    out = empty_rows((m, n), a.dtype, a.device)
    if out.numel() == 0 or k == 0:
        return out.zero_()
    rows, bn, bk = ROWS.value, BLOCK_N.value, BLOCK_K.value
    operands = (
        _descriptor(a, (rows, bk)), _descriptor(b, (bk, bn) if grad else (bn, bk)),
        _descriptor(h if grad else out, (rows, bn)), _descriptor(out, (rows, bn)),
    )  # fmt: skip
    grid = (min(num_programs(a.device), ceil_div(m, 2 * rows) * ceil_div(n, bn)),)
    launch(_relu2_mlp_gluon_kernel, grid, a.device, *operands, slope, m, n, k, grad, slope != 0, num_warps=4)
    return out


def _descriptor(tensor: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    plain = descriptor(tensor, block)
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, SHARED.value)


def linear_relu2_fwd(x: Tensor, w: Tensor, slope: float) -> Tensor:
    return _launch(x, w, None, w.shape[0], slope)


def relu2_mlp_dz(dy: Tensor, w: Tensor, h: Tensor, slope: float) -> Tensor:
    return _launch(dy, w, h, w.shape[1], slope)
