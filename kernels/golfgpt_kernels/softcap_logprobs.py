"""Softcapped cross entropy and log probabilities of target tokens, from hidden states.

    u = h Wᵀ      z = cap tanh(u / cap)      lse = log Σ exp z      logprob = z[target] - lse
    softcap_cross_entropy = z_loss lse² - logprob, per token, their mean or their sum      token_logprobs = logprob

Shapes: hidden (..., D); head_weight (V, D), rounded to hidden's dtype; targets (...), int64. Natural logarithm.
softcap=None leaves z = u. The loss is a scalar for reduction "mean" (over targets that are not ignore_index; NaN if
there is none, as in torch) and "sum", (...) for "none". Log probabilities are (...); mask (...), bool, is True where a
token is scored, None for everywhere, and the result is exactly 0 elsewhere, whatever the target there.

Backward, with p = exp(z - lse), d_logprob and d_lse the gradients of a row (0 where it is ignored or masked):
    G = ((d_lse - d_logprob) p + d_logprob onehot(target)) (1 - (z / cap)²)      dh = G W      dW = Gᵀ h

Precision: u is accumulated in fp32; eager rounds it to hidden's dtype, the kernel keeps it. Softcap, softmax and
results are fp32 (float64 for float64 hidden). G is rounded to hidden's dtype once. dW is summed in fp32; the kernel
rounds it once, to head_weight's dtype, where eager rounds it to hidden's first. So a tied fp32 embedding, given as it
is and not cast, gets both its gradients in fp32.

Memory: the loss in eager holds the logits, tokens × V, in hidden's dtype and in fp32. Eager log probabilities are
computed in chunks of 2^24 / V rows, 64 MiB of logits in fp32 (200 MiB with temporaries); with gradients autograd keeps
every chunk. The kernel holds no logits in the forward, and in the backward a chunk of 128 MiB of G.

Targets outside the vocabulary are a ValueError on CPU; on CUDA torch's own device assertion stops eager, and the
kernel returns NaN. A target that is ignore_index may be any number.

Kernels.
- forward: a program owns BLOCK_M rows, walks the vocabulary in tiles of BLOCK_N columns and keeps the sum of
  exponentials and the target's u in registers. No other program adds to its rows: no locks, no atomics, and
  the order of the sum is fixed.
- backward: a GEMM recomputes u and writes G, a chunk of rows at a time; torch.mm and the split weight gradient
  read it. Chunks are summed in order. Forward and dh in one pass, as attention does it, does not fit: the fp32 dh
  of 64 rows of 512 fills the registers, and more than 32 columns beside it spill.

Softmax without a maximum. With r = 1 / (1 + exp(2 u / cap)), z - cap = -2 cap r: three special-function
instructions per logit (ex2, rcp, ex2), no cancellation, and 1 - (z / cap)² = 4 r (1 - r). Every exp(z - cap)
lies in [exp(-2 cap), 1], so no maximum is needed while exp(-2 cap) is a normal fp32 number (cap <= 43) and
V exp(cap) is finite. It is used up to cap = 40 (65,536 exp(40) = 1.5e22). lse is log(exp(cap) Σ exp(z - cap)):
in cap + log Σ the terms would cancel. z[target] is one value per row and gets an accurate tanh. lse is within 2e-6
of float64 at cap = 30 and V = 8192 (interpreted). Larger caps, no cap, and fp32 operands take a running maximum
and the accurate tanh everywhere: z from r errs by 2e-6, and eager in fp32 by less.

The special functions are the hidden cost: 6144 clocks per 128 x 256 logits against 8192 of tensor core at
D = 512, one after the other within a program. So two programs share a multiprocessor on sm_90, and one multiplies
while the other exponentiates: tiles of 128 x 128, 96 KB, at most 128 registers. To stay within them, both kernels
take their tile in halves (whole, up to 214 registers). Compiled offline, never timed.

Sources: Gemma 2, arXiv:2408.00118 (softcap); PaLM, arXiv:2204.02311 (z-loss); Wijmans et al., "Cut Your Losses",
arXiv:2411.09009 (cross entropy without logits in memory; its locks and its skipped blocks are left out, because V / D
is 2 to 16 here).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Impl, accumulate_dtype, autocast, check_floats, check_linear, runs_triton, values_readable
from ._jit import ceil_div, descriptor, dot, dot_precision, empty_rows, halves, jit, launch, narrow, tl
from ._ops import add_op_namespace_prefix
from ._tiles import Tile, TileTable
from ._weight_grad import add_parts, num_splits, weight_grad_parts

Reduction = Literal["mean", "sum", "none"]

# Bytes of G alive at a time. 65,536 rows at V = 1024 in bf16 are one chunk; at V = 8192 a chunk is 8192 rows, whose dh
# at D = 512 is 128 tiles of 128 x 256, one for each of 132 multiprocessors. Less would leave some idle.
_CHUNK_BYTES = 1 << 27

_MAX_BOUNDED = 40.0  # the largest softcap without a maximum

# Blocks above 32 MiB go back to the system when freed. Smaller chunks let results that stay alive fragment glibc's
# heap: 30,000 rows at V = 8192 grew the process by 970 MiB with 2^22 logits a chunk, by 203 MiB with 2^24, as fast.
_CHUNK_LOGITS = 1 << 24

_MASKED = torch.iinfo(torch.int64).min  # the target of a token that is not scored


def _logits(hidden: Tensor, head_weight: Tensor, softcap: float | None) -> Tensor:
    u = F.linear(hidden, head_weight.to(hidden.dtype))
    u = u.to(accumulate_dtype(u.dtype))
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def softcap_cross_entropy_ref(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 30.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    z = _logits(hidden.reshape(targets.numel(), hidden.shape[-1]), head_weight, softcap)
    flat = targets.flatten()
    loss = F.cross_entropy(z, flat, ignore_index=ignore_index, reduction="none")
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, dim=-1).square().masked_fill(flat == ignore_index, 0)
    return _reduce(loss, targets, ignore_index, reduction)


def _reduce(loss: Tensor, targets: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != ignore_index).sum()


def token_logprobs_ref(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, *, softcap: float | None = 30.0, mask: Tensor | None = None
) -> Tensor:
    z = _logits(hidden, head_weight, softcap)
    targets = targets if mask is None else targets.where(mask, 0)
    logprobs = torch.log_softmax(z, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logprobs if mask is None else logprobs.where(mask, 0)


# ---- tiles

# Wider than INTERPRETED_GEMM: the interpreter's time is one numpy call per operation and tile.
_INTERPRETED = (
    Tile(sm=0, itemsize=2, launch={"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}),
    Tile(sm=0, itemsize=4, launch={"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}),
)
_FWD_TILES = TileTable(
    "softcap_logprobs_fwd",
    "rows",
    *_INTERPRETED,
    Tile(sm=80, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
    Tile(sm=80, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}),
    # Up to 16,384 rows, blocks of 128 would be one program per multiprocessor or less. A row's sum has the same order.
    Tile(
        sm=90,
        itemsize=2,
        launch={"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        max_size=16_384,
    ),
    Tile(sm=90, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
    Tile(sm=90, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}),
    Tile(sm=100, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
)
_GRAD_TILES = TileTable(
    "softcap_logits_grad",
    "rows",
    *_INTERPRETED,
    Tile(sm=80, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
    Tile(sm=80, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}),
    Tile(sm=90, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
    Tile(sm=90, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}),
)


# ---- kernels


@jit
def _tanh(y):
    """Relative error 3e-7: an odd polynomial (minimax in relative error, ours) where 1 - 2 / (exp(2y) + 1) cancels."""
    s = y * y
    tail = -0.3333329927 + s * (0.1333195824 + s * (-0.05378668345 + s * (0.02080538418 - 0.005905867946 * s)))
    return tl.where(s < 0.36, y + y * s * tail, 1 - 2 / (tl.exp(2 * y) + 1))


@jit
def _remainder(u, softcap):
    """r = (1 - tanh(u / softcap)) / 2"""
    return 1 / (1 + tl.exp2(u * (2.8853900817779268 / softcap)))  # 2 log2 e


@jit
def _accumulate(
    u, columns, column, logit, total, top, softcap, V, CAPPED: tl.constexpr, BOUNDED: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """u[target], Σ exp(z - top) and the maximum top, with these columns added. BOUNDED: the cap is in top's place."""
    logit += tl.sum(tl.where(columns[None, :] == column[:, None], u, 0.0), 1)
    if BOUNDED:
        e = tl.exp2(_remainder(u, softcap) * (-2.8853900817779268 * softcap))
        if RAGGED:
            e = tl.where(columns[None, :] < V, e, 0.0)
    else:
        z = softcap * _tanh(u / softcap) if CAPPED else u
        if RAGGED:
            z = tl.where(columns[None, :] < V, z, -float("inf"))
        above = tl.maximum(top, tl.max(z, 1))
        total *= tl.exp(top - above)
        top = above
        e = tl.exp(z - top[:, None])
    return logit, total + tl.sum(e, 1), top


@jit
def _softcap_logprobs_fwd_kernel(
    h_desc, w_desc, targets_ptr, logprob_ptr, lse_ptr, low_ptr, softcap,
    M, V, D, ignore_index,
    CAPPED: tl.constexpr, BOUNDED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)
    target = tl.load(targets_ptr + rows, mask=rows < M, other=0)
    inside = (target >= 0) & (target < V)
    column = tl.where(inside, target, -1).to(tl.int32)
    logit = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -3.4e38, tl.float32)  # finite, so that logits of -inf leave no inf - inf
    # Hoisting keeps the column numbers of a tile in registers: 150 of them instead of 128.
    for v in tl.range(0, V, BLOCK_N, disable_licm=True):
        u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            u = dot(h_desc.load([m, k]), w_desc.load([v, k]).T, u, PRECISION)
        left, right = halves(u, BLOCK_M, BLOCK_N)
        columns = v + tl.arange(0, BLOCK_N // 2)
        logit, total, top = _accumulate(left, columns, column, logit, total, top, softcap, V, CAPPED, BOUNDED, RAGGED)
        columns += BLOCK_N // 2
        logit, total, top = _accumulate(right, columns, column, logit, total, top, softcap, V, CAPPED, BOUNDED, RAGGED)
    z = softcap * _tanh(logit / softcap) if CAPPED else logit
    if BOUNDED:
        lse = tl.log(total * tl.exp(softcap))
        low = tl.zeros_like(lse)
        logprob = z - lse
    else:
        lse = top + tl.log(total)
        low = (top - lse) + tl.log(total)  # what lse's rounding lost: gradients at logits of 100 err 3 x less with it
        logprob = (z - top) - tl.log(total)
    logprob = tl.where(logprob > 0, 0.0, logprob)  # by rounding, where p is 1
    kept = target != ignore_index
    nan = float("nan")
    tl.store(logprob_ptr + rows, tl.where(kept, tl.where(inside, logprob, nan), 0.0), mask=rows < M)
    tl.store(lse_ptr + rows, tl.where(kept, tl.where(inside, lse, nan), 0.0), mask=rows < M)
    tl.store(low_ptr + rows, low, mask=rows < M)


@jit
def _logits_grad(
    u, columns, column, kept, lse, low, on_p, on_hit, softcap, CAPPED: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """G, in fp32, of u (rows, columns)."""
    if BOUNDED:
        r = _remainder(u, softcap)
        p = tl.exp2(((softcap - lse) * 1.4426950408889634)[:, None] - r * (2.8853900817779268 * softcap))
        slope = r - r * r
    elif CAPPED:
        t = _tanh(u / softcap)
        p = tl.exp((softcap * t - lse[:, None]) - low[:, None])
        slope = 1 - t * t
    else:
        p = tl.exp((u - lse[:, None]) - low[:, None])
        slope = 1.0
    hit = columns[None, :] == column[:, None]
    grad = slope * (on_p[:, None] * p + tl.where(hit, on_hit[:, None], 0.0))
    # 0 * p would be NaN where p overflows or hidden is NaN
    return tl.where(kept[:, None], grad, 0.0)


@jit
def _softcap_logits_grad_kernel(
    h_desc, w_desc, g_desc, targets_ptr, lse_ptr, low_ptr, d_logprob_ptr, d_lse_ptr, softcap,
    M, V, D, ignore_index,
    CAPPED: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_v = tl.cdiv(V, BLOCK_N)
    m = tl.program_id(0) // tiles_v * BLOCK_M
    v = tl.program_id(0) % tiles_v * BLOCK_N
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, D, BLOCK_K):
        u = dot(h_desc.load([m, k]), w_desc.load([v, k]).T, u, PRECISION)
    rows = m + tl.arange(0, BLOCK_M)
    target = tl.load(targets_ptr + rows, mask=rows < M, other=ignore_index)
    kept, column = target != ignore_index, target.to(tl.int32)
    lse = tl.load(lse_ptr + rows, mask=rows < M, other=0.0)
    low = tl.load(low_ptr + rows, mask=rows < M, other=0.0)
    d_logprob = tl.load(d_logprob_ptr + rows, mask=rows < M, other=0.0)
    d_lse = tl.load(d_lse_ptr + rows, mask=rows < M, other=0.0)
    FACTOR: tl.constexpr = 4.0 if BOUNDED else 1.0  # of 4 r (1 - r)
    on_p = FACTOR * (d_lse - d_logprob)
    on_hit = FACTOR * d_logprob
    left, right = halves(u, BLOCK_M, BLOCK_N)
    columns = v + tl.arange(0, BLOCK_N // 2)
    grad = _logits_grad(left, columns, column, kept, lse, low, on_p, on_hit, softcap, CAPPED, BOUNDED)
    g_desc.store([m, v], narrow(grad, g_desc.dtype))
    columns += BLOCK_N // 2
    grad = _logits_grad(right, columns, column, kept, lse, low, on_p, on_hit, softcap, CAPPED, BOUNDED)
    g_desc.store([m, v + BLOCK_N // 2], narrow(grad, g_desc.dtype))


# ---- launchers: 2-d operands of one dtype, checked by the public functions


def softcap_logprobs_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int, tile: dict | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    (m, d), v = hidden.shape, weight.shape[0]
    results = tuple(hidden.new_empty(m, dtype=torch.float32) for _ in range(3))
    if m == 0:
        return results
    tile = tile or _FWD_TILES.select(hidden.device, hidden.dtype, m)
    bm, bn, bk = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    operands = descriptor(hidden, (bm, bk)), descriptor(weight, (bn, bk)), targets.contiguous(), *results
    launch(
        _softcap_logprobs_fwd_kernel, (ceil_div(m, bm),), hidden.device,
        *operands, softcap or 0.0, m, v, d, ignore_index,
        softcap is not None, _bounded(softcap, hidden.dtype), v % bn != 0, dot_precision(hidden.dtype), **tile,
    )  # fmt: skip
    return results


def softcap_logits_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    low: Tensor,
    d_logprob: Tensor,
    d_lse: Tensor,
    softcap: float | None,
    ignore_index: int,
    out: Tensor,
    tile: dict | None = None,
) -> None:
    """G of these rows into out (M, V), of hidden's dtype and from `empty_rows`. The vectors are contiguous."""
    (m, d), v = hidden.shape, weight.shape[0]
    tile = tile or _GRAD_TILES.select(hidden.device, hidden.dtype, m)
    bm, bn, bk = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    grid = (ceil_div(m, bm) * ceil_div(v, bn),)
    operands = descriptor(hidden, (bm, bk)), descriptor(weight, (bn, bk)), descriptor(out, (bm, bn // 2))
    launch(
        _softcap_logits_grad_kernel, grid, hidden.device,
        *operands, targets, lse, low, d_logprob, d_lse, softcap or 0.0, m, v, d, ignore_index,
        softcap is not None, _bounded(softcap, hidden.dtype), dot_precision(hidden.dtype), **tile,
    )  # fmt: skip


def _bounded(softcap: float | None, dtype: torch.dtype) -> bool:
    return softcap is not None and softcap <= _MAX_BOUNDED and dtype.itemsize == 2


# ---- custom ops and the gradient


@torch.library.custom_op(add_op_namespace_prefix("softcap_logprobs"), mutates_args=())
def softcap_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    return softcap_logprobs_fwd(hidden, weight.to(hidden.dtype), targets, softcap, ignore_index)


@torch.library.custom_op(add_op_namespace_prefix("softcap_logprobs_backward"), mutates_args=())
def _softcap_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    low: Tensor,
    d_logprob: Tensor,
    d_lse: Tensor,
    softcap: float | None,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dh and partial sums of dW; what is not needed has no rows."""
    w = weight.to(hidden.dtype)
    chunk, dh, parts = _gradients(hidden, weight, needs_hidden, needs_weight)
    grad = empty_rows((chunk, len(w)), hidden.dtype, hidden.device)
    vectors = [vector.contiguous() for vector in (targets, lse, low, d_logprob, d_lse)]
    for begin, part in zip(range(0, len(hidden), chunk), parts, strict=True):
        rows = slice(begin, min(begin + chunk, len(hidden)))
        g = grad[: rows.stop - begin]
        softcap_logits_grad(hidden[rows], w, *(vector[rows] for vector in vectors), softcap, ignore_index, g)
        if needs_hidden:
            torch.mm(g, w, out=dh[rows])
        if needs_weight:
            weight_grad_parts(g, hidden[rows], part)
    return dh, parts.flatten(0, 1)


def _gradients(hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool) -> tuple[int, Tensor, Tensor]:
    """Rows of a chunk, and memory for dh and for the partial sums (chunks, splits, V, D) of dW."""
    (m, d), v = hidden.shape, weight.shape[0]
    chunk = max(1, min(m, max(128, _CHUNK_BYTES // (v * hidden.itemsize) // 128 * 128)))
    splits = num_splits(chunk, v, d, hidden.device, hidden.dtype)
    parts = (ceil_div(m, chunk), splits, v if needs_weight else 0, d)
    dh = hidden.new_empty((m if needs_hidden else 0, d))
    return chunk, dh, hidden.new_empty(parts, dtype=torch.float32)


@softcap_logprobs.register_fake
def _(hidden, weight, targets, softcap, ignore_index):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))


@_softcap_logprobs_backward.register_fake
def _(hidden, weight, targets, lse, low, d_logprob, d_lse, softcap, ignore_index, needs_hidden, needs_weight):
    _, dh, parts = _gradients(hidden, weight, needs_hidden, needs_weight)
    return dh, parts.flatten(0, 1)


def _save(ctx, inputs, output):
    hidden, weight, targets, ctx.softcap, ctx.ignore_index = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _backward(ctx, d_logprob, d_lse, _):
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    options = ctx.softcap, ctx.ignore_index, needs_hidden, needs_weight
    dh, parts = _softcap_logprobs_backward(*ctx.saved_tensors, d_logprob, d_lse, *options)
    dw = add_parts(parts, ctx.saved_tensors[1].dtype) if needs_weight else None
    return dh if needs_hidden else None, dw, None, None, None


softcap_logprobs.register_autograd(_backward, setup_context=_save)


# ---- public


def _check(op: str, hidden: Tensor, head_weight: Tensor, targets: Tensor, kept: Tensor | None, softcap: float | None):
    """targets: int64, one per row of hidden; those in `kept` (bool, None = all) lie in the vocabulary."""
    check_floats(op, hidden=hidden, head_weight=head_weight)
    check_linear(op, hidden, head_weight, "hidden", "head_weight")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets have dtype {targets.dtype}; expected torch.int64")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: targets have shape {tuple(targets.shape)}, hidden {tuple(hidden.shape)}; "
            f"expected targets of shape {tuple(hidden.shape[:-1])}"
        )
    if targets.device != hidden.device:
        raise ValueError(f"{op}: targets are on {targets.device}, hidden on {hidden.device}; use one device")
    if values_readable(targets):
        vocab_size = head_weight.shape[0]
        outside = (targets < 0) | (targets >= vocab_size)
        outside = outside if kept is None else outside & kept
        if outside.any():
            index = tuple(outside.nonzero()[0].tolist())
            raise ValueError(
                f"{op}: targets[{', '.join(map(str, index))}] = {targets[index].item()}, "
                f"outside the vocabulary; expected 0 to {vocab_size - 1}"
            )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap={softcap}; expected a positive number, or None for no cap")


def softcap_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 30.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """hidden (..., D), head_weight (V, D), targets (...) -> fp32 loss in nats."""
    op = "softcap_cross_entropy"
    _check(op, hidden, head_weight, targets, targets != ignore_index, softcap)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss={z_loss}; expected a finite number >= 0")
    hidden = autocast(hidden)
    if runs_triton(op, impl, hidden, targets.numel()):
        flat = hidden.reshape(targets.numel(), hidden.shape[-1]), head_weight, targets.flatten()
        logprobs, lse, _ = softcap_logprobs(*flat, softcap, ignore_index)
        loss = z_loss * lse.square() - logprobs if z_loss else -logprobs
        return _reduce(loss, targets, ignore_index, reduction)
    options = {"reduction": reduction, "ignore_index": ignore_index, "z_loss": z_loss}
    return softcap_cross_entropy_ref(hidden, head_weight, targets, softcap=softcap, **options)


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 30.0,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """hidden (..., D), head_weight (V, D), targets (...) -> fp32 log p(target) in nats, 0 where not mask."""
    op = "token_logprobs"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != targets.shape):
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; "
            f"expected {tuple(targets.shape)}, as targets, and torch.bool"
        )
    _check(op, hidden, head_weight, targets, mask, softcap)
    hidden = autocast(hidden)
    if runs_triton(op, impl, hidden, targets.numel()):
        scored = targets if mask is None else targets.where(mask, _MASKED)
        flat = hidden.reshape(targets.numel(), hidden.shape[-1]), head_weight, scored.flatten()
        logprobs, _, _ = softcap_logprobs(*flat, softcap, _MASKED)
        return logprobs.view(targets.shape)
    rows = max(1, _CHUNK_LOGITS // max(1, head_weight.shape[0]))
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    flat = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.flatten(), mask.flatten()
    chunks = zip(*(tensor.split(rows) for tensor in flat), strict=True)
    logprobs = [token_logprobs_ref(h, head_weight, t, softcap=softcap, mask=m) for h, t, m in chunks]
    return torch.cat(logprobs).view(targets.shape)
