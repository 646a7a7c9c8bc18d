"""The two halves of a Muon step around the orthogonalization, each one launch for all matrices of a model.

    momentum:   B ← μ B + G      U = G + μ B  (Nesterov; else U = B)      n = sums of U²
    update:     W ← W (1 − η λ) − η s O       C ← W or its quantized Ŵ, rounded

with newton_schulz_(U, square_sums=n) in between, which makes O of U; λ is the weight decay, s a factor per matrix,
max(1, rows / cols)^½ as published, and C the compute copy, the weights in the dtype in which a forward reads them.
Shapes: lists of tensors (..., rows, cols), the same in each list; G, B, W fp32 (fp16 and bf16 are taken too), U, O and
C in any float dtype. B, W and the outputs are changed in place.

μ and η are 0-d fp32 tensors on the device, so a schedule moves them without recapturing a CUDA graph. `ok`,
a 0-d bool tensor on the device, guards a step: if it is false B, W and C keep their values, without a host
synchronization.

`square_sums` (..., square_parts(rows, cols)) fp32, one for each U: part i of a matrix is its elements i PART to
(i + 1) PART in row-major order, and the sum is of the squares of U as stored, so that the parts add up to the ‖U‖²
that Newton-Schulz divides by the root of.

`specs` (a RowQuant for all matrices, or one or None for each) makes C the Ŵ = codes × stored scale of the new W,
bit for bit what fake_quantize_rows(W, spec, enabled=...) gives; where the spec is None it is W.
Matrices whose specs differ only in bits share a launch.

Precision: fp32 in registers, rounded once to each tensor's dtype. The update with quantized copies fuses no
multiplication with an addition, as the quantizer must not: its W may differ from the plain one's in the last bit.

Kernels. A program finds its tensor among ranges of blocks.
- momentum and update with plain copies: elementwise, BLOCK weights per program. Per weight, the momentum reads G and
  B and writes B and U, 4 + 4 + 4 + 2 bytes; the update reads W and O and writes W and a bf16 C, 4 + 2 + 4 + 2.
  Eager torch reads and writes B three times and makes two temporaries. A block of the momentum lies in one matrix and
  stores its sums of squares where no other block does: no atomics, the same sums every time. They replace a launch that
  reads U again.
- update with quantized copies: whole rows per program. Rows up to BLOCK long stay in registers between the
  maximum and the codes; longer ones are updated twice, the second time from L2. It moves what the plain one
  moves; fake_quantize_banks afterwards would read W once more (85 MB for 21 M weights, by arithmetic 18 us at
  4.8 TB/s) and write a second time.

Left out on purpose: MuonEq-R's row norms and NorMuon's variances, which reduce over rows: golfgpt.optim has them as
torch operations between the halves. No gradients: these are updates.

Sources: K. Jordan et al., Muon (kellerjordan.github.io/posts/muon), 2024; decoupled weight decay: Loshchilov and
Hutter, arXiv:1711.05101; the scale and the decay's order as parameter-golf's recipes have them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import KERNEL_DTYPES, Impl, accumulate_dtype, check_floats, resolve, runs_triton
from ._jit import ceil_div, jit, launch, narrow, tl
from ._ops import add_op_namespace_prefix
from ._rows import (
    SPEC_SCHEMA,
    RowQuant,
    by_launch,
    check_rows,
    clip_magnitude,
    fake_quantize_rows_ref,
    from_fields,
    joined_statistics,
    load_rows,
    one_each,
    row_arguments,
    row_codes,
    row_offsets,
    row_statistics,
    stored_scale,
    stores_scale,
    to_fields,
)
from ._tiles import INTERPRETED_BLOCK, Tile, TileTable

PART = 2048  # elements in a sum of squares; blocks of the momentum are multiples of it


def square_parts(rows: int, cols: int) -> int:
    """How many sums of squares the momentum gives of a matrix."""
    return ceil_div(rows * cols, PART)


def muon_momentum_ref_(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    outs: Sequence[Tensor],
    momentum: Tensor,
    *,
    nesterov: bool = True,
    square_sums: Sequence[Tensor] | None = None,
    ok: Tensor | None = None,
) -> None:
    for i, (g, b, u) in enumerate(zip(grads, buffers, outs, strict=True)):
        new = momentum * b.to(accumulate_dtype(b.dtype)) + g
        u.copy_(g + momentum * new if nesterov else new)
        b.copy_(new if ok is None else torch.where(ok, new, b))
        if square_sums is not None:
            squares = u.to(accumulate_dtype(u.dtype)).square().flatten(-2)
            if missing := -squares.shape[-1] % PART:
                squares = F.pad(squares, (0, missing))
            square_sums[i].copy_(squares.unflatten(-1, (-1, PART)).sum(-1))


def muon_update_ref_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: Tensor,
    *,
    scales: Sequence[float],
    weight_decay: float = 0.0,
    compute_copies: Sequence[Tensor] | None = None,
    specs: Sequence[RowQuant | None] | None = None,
    enabled: Tensor | None = None,
    ok: Tensor | None = None,
) -> None:
    for i, (w, o, s) in enumerate(zip(params, updates, scales, strict=True)):
        wide = accumulate_dtype(w.dtype)
        new = w.to(wide) * (1 - lr * weight_decay) - lr * s * o.to(wide)
        w.copy_(new if ok is None else torch.where(ok, new, w))
        if compute_copies is not None:
            copy = w.to(compute_copies[i].dtype)
            if specs is not None and specs[i] is not None:
                copy = fake_quantize_rows_ref(w, specs[i], dtype=copy.dtype, enabled=enabled)
            compute_copies[i].copy_(copy if ok is None else torch.where(ok, copy, compute_copies[i]))


# ---- tiles: BLOCK weights per program

_MOMENTUM_TILES = TileTable(
    "muon_momentum",
    "elements",
    *INTERPRETED_BLOCK,
    Tile(sm=80, itemsize=2, launch={"BLOCK": 4096, "num_warps": 4}),
    Tile(sm=80, itemsize=4, launch={"BLOCK": 4096, "num_warps": 4}),
)
_UPDATE_TILES = TileTable(
    "muon_update",
    "elements",
    *INTERPRETED_BLOCK,
    Tile(sm=80, itemsize=2, launch={"BLOCK": 4096, "num_warps": 4}),
    Tile(sm=80, itemsize=4, launch={"BLOCK": 4096, "num_warps": 4}),
)
_UPDATE_ROWS_TILES = TileTable(
    "muon_update_rows",
    "columns",
    *INTERPRETED_BLOCK,
    # With 4 warps triton 3.8 spills 25 times on sm_100 (bf16, quantile), and 21 times in a BLOCK of 2048.
    Tile(sm=80, itemsize=2, launch={"BLOCK": 4096, "num_warps": 8}),
    # With 4 warps, clip "deviation" spills in triton 3.8 (sm_90, 10 instructions).
    Tile(sm=80, itemsize=4, launch={"BLOCK": 4096, "num_warps": 8}),
)


# ---- kernels


@jit
def _momentum_kernel(
    g_ptrs, b_ptrs, u_ptrs, sums_ptrs, momentum_ptr, ok_ptr, starts,
    SIZES: tl.constexpr, NESTEROV: tl.constexpr, SUMS: tl.constexpr, PART: tl.constexpr, GUARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Elementwise: blocks starts[i] to starts[i + 1] are tensor i, of matrices of SIZES[i] elements."""
    pid = tl.program_id(0)
    momentum = tl.load(momentum_ptr)
    # True & gives it the type of a mask in triton's interpreter too, which 3.9 insists on.
    ok = True & tl.load(ok_ptr) if GUARDED else True
    for i in tl.static_range(len(SIZES)):
        if (pid >= starts[i]) & (pid < starts[i + 1]):
            blocks: tl.constexpr = (SIZES[i] + BLOCK - 1) // BLOCK
            matrix = ((pid - starts[i]) // blocks).to(tl.int64)
            block = (pid - starts[i]) % blocks
            inside = block * BLOCK + tl.arange(0, BLOCK)
            mask = inside < SIZES[i]
            offs = matrix * SIZES[i] + inside
            g = tl.load(g_ptrs[i] + offs, mask=mask, other=0).to(tl.float32)
            b = momentum * tl.load(b_ptrs[i] + offs, mask=mask, other=0).to(tl.float32) + g
            u = narrow(g + momentum * b if NESTEROV else b, u_ptrs[i].dtype.element_ty)
            tl.store(b_ptrs[i] + offs, narrow(b, b_ptrs[i].dtype.element_ty), mask=mask & ok)
            tl.store(u_ptrs[i] + offs, u, mask=mask)
            if SUMS:
                u = u.to(tl.float32)
                parts: tl.constexpr = (SIZES[i] + PART - 1) // PART
                part = block * (BLOCK // PART) + tl.arange(0, BLOCK // PART)
                sums = tl.sum(tl.reshape(u * u, (BLOCK // PART, PART)), axis=1)
                tl.store(sums_ptrs[i] + matrix * parts + part, sums, mask=part < parts)


@jit
def _update_kernel(
    w_ptrs, o_ptrs, copy_ptrs, lr_ptr, ok_ptr, starts, numels, scales, weight_decay,
    COUNT: tl.constexpr, COPY: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    lr = tl.load(lr_ptr)
    ok = True & tl.load(ok_ptr) if GUARDED else True
    for i in tl.static_range(COUNT):
        if (pid >= starts[i]) & (pid < starts[i + 1]):
            offs = (pid - starts[i]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = (offs < numels[i]) & ok
            w = tl.load(w_ptrs[i] + offs, mask=mask, other=0).to(tl.float32)
            o = tl.load(o_ptrs[i] + offs, mask=mask, other=0).to(tl.float32)
            w = narrow(w * (1 - lr * weight_decay) - lr * scales[i] * o, w_ptrs[i].dtype.element_ty)
            tl.store(w_ptrs[i] + offs, w, mask=mask)
            if COPY:
                tl.store(copy_ptrs[i] + offs, narrow(w.to(tl.float32), copy_ptrs[i].dtype.element_ty), mask=mask)


@jit
def _updated(w_ptr, o_ptr, keep, step, rows, offs_r, start, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """That tile of the new W, as stored and in fp32; zero outside."""
    w = load_rows(w_ptr, rows, offs_r, start, COLS, WIDTH)
    o = load_rows(o_ptr, rows, offs_r, start, COLS, WIDTH)
    return narrow(w * keep - step * o, w_ptr.dtype.element_ty).to(tl.float32)


@jit
def _update_rows(
    w_ptr, o_ptr, copy_ptr, ok, on, keep, step, block, rows, qmax, fraction, floor,
    COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CLIP: tl.constexpr, FULL: tl.constexpr, STORED: tl.constexpr,
    SCALE: tl.constexpr, TINY: tl.constexpr, STEP: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """One block of rows of one matrix. The quantizer's arithmetic is fake_quant.py's."""
    offs_r = block * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)
    w = _updated(w_ptr, o_ptr, keep, step, rows, offs_r, 0, COLS, WIDTH)
    first, second = row_statistics(w, COLS, CLIP)
    for start in tl.range(WIDTH, COLS, WIDTH):
        more = _updated(w_ptr, o_ptr, keep, step, rows, offs_r, start, COLS, WIDTH)
        part = row_statistics(more, COLS, CLIP)
        first, second = joined_statistics(first, second, part[0], part[1], CLIP)
    c = clip_magnitude(first, second, fraction, COLS, CLIP)
    s, stored = stored_scale(c, qmax, floor, CLIP, SCALE, TINY, STEP, MAX)
    decode = stored.to(tl.float32)
    s = decode if STORED else s
    for start in tl.range(0, COLS, WIDTH):
        if COLS > WIDTH:
            w = _updated(w_ptr, o_ptr, keep, step, rows, offs_r, start, COLS, WIDTH)
        copy = tl.where(on, row_codes(w, c, s, qmax, FULL, CLIP) * decode[:, None], w)
        offs, mask = row_offsets(rows, offs_r, start, COLS, WIDTH)
        tl.store(w_ptr + offs, narrow(w, w_ptr.dtype.element_ty), mask=mask & ok)
        tl.store(copy_ptr + offs, narrow(copy, copy_ptr.dtype.element_ty), mask=mask & ok)


@jit
def _update_rows_kernel(
    w_ptrs, o_ptrs, copy_ptrs, lr_ptr, ok_ptr, on_ptr, scales, weight_decay, starts, rows, qmax, fraction, floor,
    COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CLIP: tl.constexpr, FULL: tl.constexpr, STORED: tl.constexpr,
    SCALE: tl.constexpr, TINY: tl.constexpr, STEP: tl.constexpr, MAX: tl.constexpr,
    GUARDED: tl.constexpr, SWITCH: tl.constexpr,
):  # fmt: skip
    """Blocks starts[i] to starts[i + 1] are rows of matrix i."""
    pid = tl.program_id(0)
    lr = tl.load(lr_ptr)
    ok = True & tl.load(ok_ptr) if GUARDED else True
    on = tl.load(on_ptr) != 0 if SWITCH else True
    for i in tl.static_range(len(COLS)):
        if (pid >= starts[i]) & (pid < starts[i + 1]):
            _update_rows(
                w_ptrs[i], o_ptrs[i], copy_ptrs[i], ok, on, 1 - lr * weight_decay, lr * scales[i], pid - starts[i],
                rows[i], qmax[i], fraction[i], floor,
                COLS[i], WIDTH[i], BLOCK, CLIP, FULL, STORED, SCALE, TINY, STEP, MAX,
            )  # fmt: skip


# ---- launchers and custom ops: contiguous tensors, checked by the public functions


def momentum_launch(grads, buffers, outs, square_sums, momentum, nesterov, ok, tile=None) -> None:
    tile = tile or _MOMENTUM_TILES.select(momentum.device, grads[0].dtype, 0)
    sizes = tuple(g.shape[-2:].numel() for g in grads)
    starts = _starts(g.numel() // max(n, 1) * ceil_div(n, tile["BLOCK"]) for g, n in zip(grads, sizes, strict=True))
    if starts[-1]:
        launch(
            _momentum_kernel, (starts[-1],), momentum.device,
            tuple(grads), tuple(buffers), tuple(outs), tuple(square_sums or outs), momentum,
            momentum if ok is None else ok, starts,
            SIZES=sizes, NESTEROV=nesterov, SUMS=bool(square_sums), PART=PART, GUARDED=ok is not None, **tile,
        )  # fmt: skip


def update_launch(params, updates, lr, scales, weight_decay, compute_copies, ok, tile=None) -> None:
    tile = tile or _UPDATE_TILES.select(lr.device, params[0].dtype, 0)
    numels = tuple(p.numel() for p in params)
    starts = _starts(ceil_div(n, tile["BLOCK"]) for n in numels)
    if starts[-1]:
        launch(
            _update_kernel, (starts[-1],), lr.device, tuple(params), tuple(updates), tuple(compute_copies or params),
            lr, lr if ok is None else ok, starts, numels, tuple(scales), weight_decay,
            COUNT=len(numels), COPY=bool(compute_copies), GUARDED=ok is not None, **tile,
        )  # fmt: skip


def update_rows_launch(
    params, updates, lr, scales, weight_decay, compute_copies, ok, enabled, specs, tile=None
) -> None:
    programs, numbers, options = row_arguments(params, specs, _UPDATE_ROWS_TILES, tile)
    if programs:
        launch(
            _update_rows_kernel, (programs,), lr.device, tuple(params), tuple(updates), tuple(compute_copies), lr,
            lr if ok is None else ok, lr if enabled is None else enabled, tuple(scales), weight_decay, *numbers,
            GUARDED=ok is not None, SWITCH=enabled is not None, **options,
        )  # fmt: skip


def _starts(counts) -> tuple[int, ...]:
    return (0, *itertools.accumulate(counts))


_momentum_op = torch.library.custom_op(
    add_op_namespace_prefix("muon_momentum_"),
    momentum_launch,
    mutates_args=("buffers", "outs", "square_sums"),
    schema="(Tensor[] grads, Tensor(a!)[] buffers, Tensor(b!)[] outs, Tensor(c!)[] square_sums, Tensor momentum, "
    "bool nesterov, Tensor? ok) -> ()",
)
_update_op = torch.library.custom_op(
    add_op_namespace_prefix("muon_update_"),
    update_launch,
    mutates_args=("params", "compute_copies"),
    schema="(Tensor(a!)[] params, Tensor[] updates, Tensor lr, float[] scales, float weight_decay, "
    "Tensor(b!)[] compute_copies, Tensor? ok) -> ()",
)


@torch.library.custom_op(
    add_op_namespace_prefix("muon_update_rows_"),
    mutates_args=("params", "compute_copies"),
    schema="(Tensor(a!)[] params, Tensor[] updates, Tensor lr, float[] scales, float weight_decay, "
    f"Tensor(b!)[] compute_copies, Tensor? ok, Tensor? enabled, *, {SPEC_SCHEMA}) -> ()",
)
def _update_rows_op(params, updates, lr, scales, weight_decay, compute_copies, ok, enabled, **fields):
    update_rows_launch(params, updates, lr, scales, weight_decay, compute_copies, ok, enabled, from_fields(**fields))


@_momentum_op.register_fake
@_update_op.register_fake
@_update_rows_op.register_fake
def _(*_args, **_options):
    return None


# ---- public


@torch.no_grad()
def muon_momentum_(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    outs: Sequence[Tensor],
    momentum: Tensor,
    *,
    nesterov: bool = True,
    square_sums: Sequence[Tensor] | None = None,
    ok: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Momentum of all matrices: `buffers` are moved on, `outs` get what is to be orthogonalized, and `square_sums`,
    (..., square_parts(rows, cols)) fp32, what newton_schulz takes by that name."""
    op = "muon_momentum_"
    _check_lists(op, grads=grads, buffers=buffers, outs=outs)
    _check_square_sums(op, outs, square_sums)
    _check_scalar(op, grads, torch.float32, momentum=momentum)
    _check_scalar(op, grads, torch.bool, ok=ok)
    if not grads:
        return
    if _by_kernel(op, impl, grads=grads, buffers=buffers, outs=outs, square_sums=square_sums or []):
        _momentum_op(list(grads), list(buffers), list(outs), list(square_sums or []), momentum, nesterov, ok)
    else:
        muon_momentum_ref_(grads, buffers, outs, momentum, nesterov=nesterov, square_sums=square_sums, ok=ok)


@torch.no_grad()
def muon_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: Tensor,
    *,
    scales: Sequence[float],
    weight_decay: float = 0.0,
    compute_copies: Sequence[Tensor] | None = None,
    specs: RowQuant | Sequence[RowQuant | None] | None = None,
    enabled: Tensor | None = None,
    ok: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Weight decay and update of all matrices, and their compute copies if there are any: fake-quantized by
    the matrix's spec, where that is None rounded. One launch for all whose specs differ in bits only."""
    op = "muon_update_"
    copies = {} if compute_copies is None else {"compute_copies": compute_copies}
    _check_lists(op, params=params, updates=updates, **copies)
    _check_scalar(op, params, torch.float32, lr=lr)
    _check_scalar(op, params, torch.bool, ok=ok, enabled=enabled)
    if len(scales) != len(params):
        raise ValueError(f"{op}: {len(scales)} scales for {len(params)} params; expected one each")
    specs = one_each(op, specs, len(params))
    for i, (p, spec) in enumerate(zip(params, specs, strict=True)):
        if spec is not None:
            check_rows(op, f"params[{i}]", p, spec)
            if compute_copies is None:
                raise ValueError(f"{op}: a spec for params[{i}] and no compute_copies; expected them with specs")
    calls = []  # made when all are known to be possible
    for members in by_launch(specs):
        lists = params, updates, scales, compute_copies or [], specs
        ws, os, factors, copies, quants = ([each[i] for i in members] if each else [] for each in lists)
        spec, tensors = quants[0], {"params": ws, "updates": os, "compute_copies": copies}
        args = ws, os, lr, factors, weight_decay, copies, ok
        options = dict(scales=factors, weight_decay=weight_decay, compute_copies=copies or None, specs=quants)
        eager = partial(muon_update_ref_, ws, os, lr, **options, enabled=enabled, ok=ok)
        if spec is None:  # two kernels, of which "auto" asks one by one
            calls.append(partial(_update_op, *args) if _by_kernel(op, impl, **tensors) else eager)
        elif _by_kernel("muon_update_rows_", impl, spec, **tensors):
            calls.append(partial(_update_rows_op, *args, enabled, **to_fields(quants)))
        else:
            calls.append(eager)
    for call in calls:
        call()


def _check_lists(op: str, **lists: Sequence[Tensor]) -> None:
    (first, tensors), *others = lists.items()
    for name, other in others:
        if [t.shape for t in other] != [t.shape for t in tensors]:
            shapes = [[tuple(t.shape) for t in ts] for ts in (tensors, other)]
            raise ValueError(f"{op}: {first} have shapes {shapes[0]} and {name} {shapes[1]}; expected the same")
    for name, each in lists.items():
        check_floats(op, **{f"{name}[{i}]": t for i, t in enumerate(each)})
        if len({t.dtype for t in each}) > 1:
            raise ValueError(f"{op}: {name} have dtypes {sorted({str(t.dtype) for t in each})}; expected one")


def _check_square_sums(op: str, outs: Sequence[Tensor], square_sums: Sequence[Tensor] | None) -> None:
    if square_sums is None:
        return
    check_floats(op, **{f"square_sums[{i}]": t for i, t in enumerate((*square_sums, *outs[:1]))})
    if any(u.ndim < 2 for u in outs):
        raise ValueError(f"{op}: outs have shapes {[tuple(u.shape) for u in outs]}; expected (..., rows, cols)")
    shapes = [(*u.shape[:-2], square_parts(*u.shape[-2:])) for u in outs]
    dtype = accumulate_dtype(outs[0].dtype) if outs else torch.float32
    if [tuple(t.shape) for t in square_sums] != shapes or any(t.dtype != dtype for t in square_sums):
        raise ValueError(
            f"{op}: square_sums have shapes {[tuple(t.shape) for t in square_sums]} and dtypes "
            f"{sorted({str(t.dtype) for t in square_sums})}; expected {shapes} in {dtype}"
        )


def _check_scalar(op: str, tensors: Sequence[Tensor], dtype: torch.dtype, **scalars: Tensor | None) -> None:
    """Each a 0-d tensor of `dtype`; what is bool may be missing."""
    for name, value in scalars.items():
        if value is None and dtype == torch.bool:
            continue
        if not isinstance(value, Tensor):
            given = f"is a {type(value).__name__}"
        elif value.dtype != dtype or value.ndim or (tensors and value.device != tensors[0].device):
            given = f"has dtype {value.dtype}, shape {tuple(value.shape)}, on {value.device}"
        else:
            continue
        raise ValueError(f"{op}: {name} {given}; expected a 0-d {dtype} tensor on the matrices' device")


def _by_kernel(op: str, impl: Impl, spec: RowQuant | None = None, **lists: Sequence[Tensor]) -> bool:
    """Whether the kernel runs. It needs contiguous tensors of its dtypes, and a scale that it can store; for others
    "auto" is eager.

    Measurements are looked up by the dtype of the first list.
    """
    impl = resolve(op, impl)
    first, *others = (tensors[0] for tensors in lists.values() if tensors)
    if not runs_triton(op, impl, first, 1 << 62):
        return False
    for tensor in others:
        if impl == "triton":
            runs_triton(op, impl, tensor, 1 << 62)  # raises where it cannot
        elif tensor.dtype not in KERNEL_DTYPES:
            return False
    for name, tensors in lists.items():
        if not all(t.is_contiguous() for t in tensors):
            if impl == "triton":
                raise RuntimeError(f"{op}: impl='triton' cannot run: {name} are not contiguous; impl='eager' can")
            return False
    return spec is None or stores_scale(op, impl, spec)
