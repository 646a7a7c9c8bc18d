"""The two halves of a Muon step around the orthogonalization, each one launch for all matrices of a model.

    momentum:   B ← μ B + G      U = G + μ B  (Nesterov; else U = B)
    update:     W ← W (1 − η λ) − η s O       shadow ← W, rounded

with O = newton_schulz(U) in between, λ the weight decay and s a factor per matrix, max(1, rows / cols)^½ as
published. Shapes: lists of tensors (..., rows, cols), the same in each list; G, B, W fp32 (fp16 and bf16 are
taken too), U and O in any float dtype. B, W and the outputs are changed in place.

μ and η are 0-d fp32 tensors on the device, so a schedule moves them without recapturing a CUDA graph. `ok`,
a 0-d bool tensor on the device, guards a step: where it is false B, W and the shadows keep their values, and
nobody waits to find out.

Precision: fp32 in registers, rounded once to each tensor's dtype.

Kernels. Elementwise over all tensors at once: a program finds its tensor among ranges of blocks. Reading G and B
and writing B and U is 4 + 4 + 4 + 2 bytes a weight, reading W and O and writing W and a bf16 shadow 4 + 2 + 4 + 2;
eager torch reads and writes B three times and makes two temporaries.

Left out on purpose: fake-quantized shadows, which fake_quantize_banks writes in one more launch (by arithmetic
it reads 85 MB for 21 M weights, 18 us at 4.8 TB/s, which fusing could save); MuonEq-R's row norms and NorMuon's
variances, which reduce over rows: golfgpt.optim has them as torch operations between the halves. No gradients:
these are updates.

Sources: K. Jordan et al., Muon (kellerjordan.github.io/posts/muon), 2024; decoupled weight decay: Loshchilov and
Hutter, arXiv:1711.05101; the scale and the decay's order as parameter-golf's recipes have them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ._dispatch import Impl, accumulate_dtype, check_floats, runs_triton
from ._jit import jit, launch, narrow, tl
from ._tiles import Tile, TileTable

__all__ = [
    "muon_momentum_",
    "muon_momentum_cost",
    "muon_momentum_ref_",
    "muon_update_",
    "muon_update_cost",
    "muon_update_ref_",
]


def muon_momentum_ref_(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    outs: Sequence[Tensor],
    momentum: Tensor,
    *,
    nesterov: bool = True,
    ok: Tensor | None = None,
) -> None:
    for g, b, u in zip(grads, buffers, outs, strict=True):
        new = momentum * b.to(accumulate_dtype(b.dtype)) + g
        u.copy_(g + momentum * new if nesterov else new)
        b.copy_(new if ok is None else torch.where(ok, new, b))


def muon_update_ref_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: Tensor,
    *,
    scales: Sequence[float],
    weight_decay: float = 0.0,
    shadows: Sequence[Tensor] | None = None,
    ok: Tensor | None = None,
) -> None:
    for i, (w, o, s) in enumerate(zip(params, updates, scales, strict=True)):
        wide = accumulate_dtype(w.dtype)
        new = w.to(wide) * (1 - lr * weight_decay) - lr * s * o.to(wide)
        w.copy_(new if ok is None else torch.where(ok, new, w))
        if shadows is not None:
            shadows[i].copy_(w if ok is None else torch.where(ok, w, shadows[i].to(w.dtype)))


def muon_momentum_cost(numel: int, *, itemsize: int = 2) -> tuple[int, int]:
    """(flops, bytes): gradient and buffer read, buffer and update of `itemsize` bytes written."""
    return 4 * numel, numel * (12 + itemsize)


def muon_update_cost(numel: int, *, itemsize: int = 2, shadow_itemsize: int = 2) -> tuple[int, int]:
    """(flops, bytes): weight and update read, weight and shadow written."""
    return 4 * numel, numel * (8 + itemsize + shadow_itemsize)


# ---- tiles: BLOCK weights a program


def _table(kernel: str) -> TileTable:
    tiles = ((0, 2048), (80, 4096))
    return TileTable(
        kernel,
        "elements",
        *(
            Tile(sm=sm, itemsize=size, launch={"BLOCK": block, "num_warps": 4})
            for sm, block in tiles
            for size in (2, 4)
        ),
    )


_MOMENTUM_TILES, _UPDATE_TILES = _table("muon_momentum"), _table("muon_update")


# ---- kernels


@jit
def _momentum_kernel(
    g_ptrs, b_ptrs, u_ptrs, momentum_ptr, ok_ptr, starts, numels,
    COUNT: tl.constexpr, NESTEROV: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elementwise: blocks starts[i] to starts[i + 1] are tensor i."""
    pid = tl.program_id(0)
    momentum = tl.load(momentum_ptr)
    ok = tl.load(ok_ptr) != 0 if GUARDED else True
    for i in tl.static_range(COUNT):
        if (pid >= starts[i]) & (pid < starts[i + 1]):
            offs = (pid - starts[i]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < numels[i]
            g = tl.load(g_ptrs[i] + offs, mask=mask, other=0).to(tl.float32)
            b = momentum * tl.load(b_ptrs[i] + offs, mask=mask, other=0).to(tl.float32) + g
            u = g + momentum * b if NESTEROV else b
            tl.store(b_ptrs[i] + offs, narrow(b, b_ptrs[i].dtype.element_ty), mask=mask & ok)
            tl.store(u_ptrs[i] + offs, narrow(u, u_ptrs[i].dtype.element_ty), mask=mask)


@jit
def _update_kernel(
    w_ptrs, o_ptrs, shadow_ptrs, lr_ptr, ok_ptr, starts, numels, scales, weight_decay,
    COUNT: tl.constexpr, SHADOW: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    lr = tl.load(lr_ptr)
    ok = tl.load(ok_ptr) != 0 if GUARDED else True
    for i in tl.static_range(COUNT):
        if (pid >= starts[i]) & (pid < starts[i + 1]):
            offs = (pid - starts[i]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = (offs < numels[i]) & ok
            w = tl.load(w_ptrs[i] + offs, mask=mask, other=0).to(tl.float32)
            o = tl.load(o_ptrs[i] + offs, mask=mask, other=0).to(tl.float32)
            w = narrow(w * (1 - lr * weight_decay) - lr * scales[i] * o, w_ptrs[i].dtype.element_ty)
            tl.store(w_ptrs[i] + offs, w, mask=mask)
            if SHADOW:
                tl.store(shadow_ptrs[i] + offs, narrow(w.to(tl.float32), shadow_ptrs[i].dtype.element_ty), mask=mask)


# ---- launchers and custom ops: contiguous tensors, checked by the public functions


def _blocks(tensors: Sequence[Tensor], table: TileTable, tile: dict | None) -> tuple[dict, tuple, tuple]:
    tile = tile or table.select(tensors[0].device, tensors[0].dtype, 0)
    numels = tuple(t.numel() for t in tensors)
    return tile, (0, *itertools.accumulate(-(-n // tile["BLOCK"]) for n in numels)), numels


def momentum_launch(grads, buffers, outs, momentum, nesterov, ok, tile=None) -> None:
    tile, starts, numels = _blocks(grads, _MOMENTUM_TILES, tile)
    if starts[-1]:
        launch(
            _momentum_kernel, (starts[-1],), momentum.device, tuple(grads), tuple(buffers), tuple(outs), momentum,
            momentum if ok is None else ok, starts, numels,
            COUNT=len(numels), NESTEROV=nesterov, GUARDED=ok is not None, **tile,
        )  # fmt: skip


def update_launch(params, updates, lr, scales, weight_decay, shadows, ok, tile=None) -> None:
    tile, starts, numels = _blocks(params, _UPDATE_TILES, tile)
    if starts[-1]:
        launch(
            _update_kernel, (starts[-1],), lr.device, tuple(params), tuple(updates), tuple(shadows or params), lr,
            lr if ok is None else ok, starts, numels, tuple(scales), weight_decay,
            COUNT=len(numels), SHADOW=bool(shadows), GUARDED=ok is not None, **tile,
        )  # fmt: skip


_momentum_op = torch.library.custom_op(
    "golfgpt::muon_momentum_",
    momentum_launch,
    mutates_args=("buffers", "outs"),
    schema="(Tensor[] grads, Tensor(a!)[] buffers, Tensor(b!)[] outs, Tensor momentum, bool nesterov, "
    "Tensor? ok) -> ()",
)
_update_op = torch.library.custom_op(
    "golfgpt::muon_update_",
    update_launch,
    mutates_args=("params", "shadows"),
    schema="(Tensor(a!)[] params, Tensor[] updates, Tensor lr, float[] scales, float weight_decay, "
    "Tensor(b!)[] shadows, Tensor? ok) -> ()",
)


@_momentum_op.register_fake
def _(*_args):
    return None


@_update_op.register_fake
def _(*_args):
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
    ok: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Momentum of all matrices: `buffers` are moved on, `outs` get what is to be orthogonalized."""
    op = "muon_momentum_"
    _check_lists(op, grads=grads, buffers=buffers, outs=outs)
    _check_scalar(op, grads, momentum=momentum, ok=ok)
    if not grads:
        return
    if _by_kernel(op, impl, grads=grads, buffers=buffers, outs=outs):
        _momentum_op(list(grads), list(buffers), list(outs), momentum, nesterov, ok)
    else:
        muon_momentum_ref_(grads, buffers, outs, momentum, nesterov=nesterov, ok=ok)


@torch.no_grad()
def muon_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: Tensor,
    *,
    scales: Sequence[float],
    weight_decay: float = 0.0,
    shadows: Sequence[Tensor] | None = None,
    ok: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Weight decay and update of all matrices, and their low-precision shadows if there are any."""
    op = "muon_update_"
    _check_lists(op, params=params, updates=updates, **({} if shadows is None else {"shadows": shadows}))
    _check_scalar(op, params, lr=lr, ok=ok)
    if len(scales) != len(params):
        raise ValueError(f"{op}: {len(scales)} scales for {len(params)} params; possible: one each")
    if not params:
        return
    if _by_kernel(op, impl, params=params, updates=updates, shadows=shadows or []):
        _update_op(list(params), list(updates), lr, list(scales), weight_decay, list(shadows or []), ok)
    else:
        muon_update_ref_(params, updates, lr, scales=scales, weight_decay=weight_decay, shadows=shadows, ok=ok)


def _check_lists(op: str, **lists: Sequence[Tensor]) -> None:
    (first, tensors), *others = lists.items()
    for name, other in others:
        if [t.shape for t in other] != [t.shape for t in tensors]:
            shapes = [[tuple(t.shape) for t in ts] for ts in (tensors, other)]
            raise ValueError(f"{op}: {first} have shapes {shapes[0]} and {name} {shapes[1]}; possible: the same")
    for name, each in lists.items():
        check_floats(op, **{f"{name}[{i}]": t for i, t in enumerate(each)})
        if len({t.dtype for t in each}) > 1:
            raise ValueError(f"{op}: {name} have dtypes {sorted({str(t.dtype) for t in each})}; possible: one")


def _check_scalar(op: str, tensors: Sequence[Tensor], *, ok: Tensor | None, **scalars: Tensor) -> None:
    for name, value in scalars.items():
        if value.dtype != torch.float32 or value.ndim or (tensors and value.device != tensors[0].device):
            raise ValueError(
                f"{op}: {name} has dtype {value.dtype}, shape {tuple(value.shape)}, on {value.device}; "
                f"possible: a 0-d fp32 tensor on the matrices' device"
            )
    if ok is not None and (ok.dtype != torch.bool or ok.ndim or (tensors and ok.device != tensors[0].device)):
        raise ValueError(
            f"{op}: ok has dtype {ok.dtype}, shape {tuple(ok.shape)}, on {ok.device}; "
            f"possible: a 0-d bool tensor on the matrices' device"
        )


def _by_kernel(op: str, impl: Impl, **lists: Sequence[Tensor]) -> bool:
    """Whether the kernel runs; it wants contiguous tensors of its dtypes, where "auto" takes eager for others."""
    if not all(runs_triton(op, impl, tensors[0], 1 << 62) for tensors in lists.values() if tensors):
        return False
    for name, tensors in lists.items():
        if not all(t.is_contiguous() for t in tensors):
            if impl == "triton":
                raise RuntimeError(f"{op}: impl='triton' cannot run: {name} are not contiguous; impl='eager' can")
            return False
    return True
