"""Row quantizer to N-bit codes, and the linear layer that trains through it.

    c = clip magnitude of a row     s = max(c / qmax, scale_floor)     q = round(clamp(w, ±c) / s)     ŵ = q s
    qmax = 2^(bits-1) - 1           codes in [-qmax, qmax] ("symmetric") or [-qmax - 1, qmax] ("full")

Shapes: w (..., rows, cols), banks with leading dimensions included; codes as w, int8 whatever `bits` is;
scale (..., rows), or (..., rows, cols / group_size) where groups of `group_size` neighbouring columns
have their own scale. All options are fields of `RowQuant`.

clip "max": c = max |w|. clip "deviation": c = `deviations` unbiased standard deviations of the row, and only the range
of the codes clips (SDClip, 2026-04-05). clip "quantile": c = torch.quantile(|w|, 0.9999984, dim=-1), bit for bit in
fp32 as torch up to 2.13 computes it, which made the published exports; 2.14 rounds the rank elsewhere (1e-5 of c at
1,000 columns). Its rank 0.9999984 (cols - 1), computed in fp32, falls between the two largest magnitudes: a top-2 finds
it.

Precision: fp32 throughout (float64 for float64 weights), true division, round half to even. The scale is stored
rounded to `scale_dtype`. `codes_from` says whether codes divide by the scale as stored (decoding then undoes exactly
what encoding did) or by the fp32 scale before that rounding (as the published int8 export does). ŵ is one fp32
product, rounded once to the dtype asked for.

Range of the stored scale. Below the smallest normal number of fp16 (6.1e-5: an 8-bit row whose maximum is below
7.8e-3) the scale is rounded up to a multiple of 2^-24, since rounding to nearest with so few bits would clip the row's
maximum by up to a third; a row of magnitude 1e-6 keeps codes up to 17. bf16 and fp32 scales stop at their smallest
normal number, 1.2e-38. A zero row gets the least positive scale: codes 0, no NaN. Above the largest finite number
(65504) the scale saturates and so do the codes: never inf.

Backward of the fake-quantized ops is straight-through, without a mask for clipped weights:
    y = x ŵᵀ      dx = dy ŵ      dw = dyᵀ x

`enabled`, a 0-d bool tensor on w's device, turns fake quantization on in the middle of a run without a recompilation
or a host synchronization: while it is false ŵ is w, rounded to the dtype asked for.

Forms of fake_quant_linear. "compute_copy" rounds ŵ to x's dtype, which is what evaluation of a decoded artifact
computes with, and multiplies: y = x ŵᵀ. "codes" multiplies by the integers, exact in every 16-bit dtype, and scales the
fp32 accumulator: y = (x qᵀ) s; it needs one scale per row and `enabled` None. Both have the same gradients. "auto" is
"compute_copy" where no measurement shows "codes" to be faster.

Kernels.
- quantize: one launch for all rows of any number of matrices. Matrices come as tuples, and the branch that a program
  takes is compiled for the columns of its matrix: rows up to BLOCK long are read once and stay in registers, longer
  ones are read twice, the second time from L2. Codes equal the reference exactly, ties included: true division
  (`tl.div_rn`), no fused multiply-add, half to even by adding and subtracting 1.5 x 2^23. Only the quantile's
  interpolation is fused, as torch.lerp's is: it is computed in float64 and rounded once.
- codes x scale: a persistent GEMM over TMA tiles. Quantizing inside a GEMM's loop is left out: every row block repeats
  it, 402 M element operations per matmul at 65,536 rows.

Weights that are NaN or infinite are a ValueError on CPU, and not looked for on CUDA and under torch.compile.

Sources: Bengio et al., arXiv:1308.3432 (straight-through); the quantile is parameter-golf's int8 export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import (
    FLOAT_DTYPES,
    Impl,
    accumulate_dtype,
    autocast,
    check_floats,
    check_linear,
    resolve,
    runs_triton,
    values_readable,
)
from ._jit import ceil_div, descriptor, dot, dot_precision, empty_rows, halves, jit, launch, narrow, num_programs, tl
from ._ops import add_op_namespace_prefix
from ._rows import (
    SPEC_SCHEMA,
    RowQuant,
    by_launch,
    check_group,
    check_rows,
    clip_magnitude,
    decode_rows,
    fake_quantize_rows_ref,
    from_fields,
    joined_statistics,
    load_rows,
    one_each,
    quantize_rows_ref,
    row_arguments,
    row_codes,
    row_offsets,
    row_statistics,
    stored_scale,
    stores_scale,
    to_fields,
)
from ._tiles import INTERPRETED_BLOCK, INTERPRETED_GEMM, Tile, TileTable

Form = Literal["auto", "compute_copy", "codes"]


def fake_quant_linear_ref(x: Tensor, w: Tensor, spec: RowQuant, *, enabled: Tensor | None = None) -> Tensor:
    w_hat = fake_quantize_rows_ref(w.detach(), spec, dtype=x.dtype, enabled=enabled)
    return F.linear(x, straight_through(w, w_hat))


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


def straight_through(w: Tensor, w_hat: Tensor) -> Tensor:
    """w_hat's values (of w's shape, any float dtype) with its gradient going to w, in w's dtype, unchanged."""
    return _StraightThrough.apply(w, w_hat)


class _CodesLinear(torch.autograd.Function):
    """(x codesᵀ) scale with the gradients of x ŵᵀ, that of ŵ passed to w. A kernel needs x (M, K) and codes in
    its dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, codes: Tensor, scale: Tensor, by_kernel: bool) -> Tensor:
        ctx.save_for_backward(x, codes, scale)
        ctx.dtype = w.dtype
        if by_kernel:
            return _codes_linear(x, codes, scale)
        wide = accumulate_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return (F.linear(x.to(wide), codes.to(wide)) * scale.to(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, codes, scale = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy @ decode_rows(codes, scale, dy.dtype, None)
        if ctx.needs_input_grad[1]:
            dw = (dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])).to(ctx.dtype)
        return dx, dw, None, None, None


# ---- tiles

# BLOCK is the number of weights that a program holds: rows of 512 come 8 at a time.
_ROW_TILES = TileTable(
    "quantize_rows",
    "columns",
    *INTERPRETED_BLOCK,
    Tile(sm=80, itemsize=2, launch={"BLOCK": 4096, "num_warps": 4}),
    # With 4 warps, the float64 sums of clip "deviation" spill in triton 3.6 (sm_100, 2 instructions).
    Tile(sm=80, itemsize=4, launch={"BLOCK": 4096, "num_warps": 8}),
)
_CODES_TILES = TileTable(
    "codes_linear",
    "rows",
    *INTERPRETED_GEMM,
    Tile(sm=80, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
    Tile(sm=80, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}),
    Tile(sm=90, itemsize=2, launch={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
    Tile(sm=90, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}),
    # With BLOCK_K 16 or 2 stages tf32 spills in triton 3.8 (12 to 16 instructions). On sm_90 nothing spills, and
    # BLOCK_K 32 would need 194 registers in place of 128.
    Tile(sm=100, itemsize=4, launch={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
)


# ---- kernels


@jit
def _clip(w_ptr, rows, offs_r, fraction, COLS: tl.constexpr, WIDTH: tl.constexpr, CLIP: tl.constexpr):
    """The clip magnitude of rows longer than a block, in one pass."""
    first = tl.zeros_like(offs_r).to(tl.float64 if CLIP == 2 else tl.float32)
    second = first
    for start in tl.range(0, COLS, WIDTH):
        more = row_statistics(load_rows(w_ptr, rows, offs_r, start, COLS, WIDTH), COLS, CLIP)
        first, second = joined_statistics(first, second, more[0], more[1], CLIP)
    return clip_magnitude(first, second, fraction, COLS, CLIP)


@jit
def _quantize_matrix(
    w_ptr, out_ptr, scale_ptr, on, block, rows, qmax, fraction, floor,
    COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CLIP: tl.constexpr, FULL: tl.constexpr, STORED: tl.constexpr,
    SCALE: tl.constexpr, TINY: tl.constexpr, STEP: tl.constexpr, MAX: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """One block of rows of one matrix: codes and scale if CODES, else ŵ (w where `on` is false)."""
    offs_r = block * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)
    w = load_rows(w_ptr, rows, offs_r, 0, COLS, WIDTH)
    if COLS <= WIDTH:
        first, second = row_statistics(w, COLS, CLIP)
        c = clip_magnitude(first, second, fraction, COLS, CLIP)
    else:
        c = _clip(w_ptr, rows, offs_r, fraction, COLS, WIDTH, CLIP)
    s, stored = stored_scale(c, qmax, floor, CLIP, SCALE, TINY, STEP, MAX)
    decode = stored.to(tl.float32)
    s = decode if STORED else s
    for start in tl.range(0, COLS, WIDTH):
        if COLS > WIDTH:
            w = load_rows(w_ptr, rows, offs_r, start, COLS, WIDTH)
        q = row_codes(w, c, s, qmax, FULL, CLIP)
        out = q if CODES else tl.where(on, q * decode[:, None], w)
        offs, mask = row_offsets(rows, offs_r, start, COLS, WIDTH)
        tl.store(out_ptr + offs, narrow(out, out_ptr.dtype.element_ty), mask=mask)
    if CODES:
        tl.store(scale_ptr + offs_r, stored, mask=offs_r < rows)


@jit
def _quantize_kernel(
    w_ptrs, out_ptrs, scale_ptrs, on_ptr, first_block, rows, qmax, fraction, floor,
    COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CLIP: tl.constexpr, FULL: tl.constexpr, STORED: tl.constexpr,
    SCALE: tl.constexpr, TINY: tl.constexpr, STEP: tl.constexpr, MAX: tl.constexpr, CODES: tl.constexpr,
    SWITCH: tl.constexpr,
):  # fmt: skip
    """Blocks first_block[i] to first_block[i + 1] belong to matrix i."""
    pid = tl.program_id(0)
    on = tl.load(on_ptr) != 0 if SWITCH else True
    for i in tl.static_range(len(COLS)):
        if (pid >= first_block[i]) & (pid < first_block[i + 1]):
            _quantize_matrix(
                w_ptrs[i], out_ptrs[i], scale_ptrs[i], on, pid - first_block[i], rows[i], qmax[i], fraction[i], floor,
                COLS[i], WIDTH[i], BLOCK, CLIP, FULL, STORED, SCALE, TINY, STEP, MAX, CODES,
            )  # fmt: skip


@jit
def _codes_linear_kernel(
    x_desc, codes_desc, scale_ptr, y_desc,
    M, N, K,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, N) = (x codesᵀ) scale, with x (M, K), codes (N, K) whole numbers in x's dtype."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=True):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            acc = dot(x_desc.load([m, k]), codes_desc.load([n, k]).T, acc, PRECISION)
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        offs_n = n + tl.arange(0, HALF)
        scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0).to(tl.float32)
        y_desc.store([m, n], narrow(left * scale[None, :], y_desc.dtype))
        scale = tl.load(scale_ptr + offs_n + HALF, mask=offs_n + HALF < N, other=0).to(tl.float32)
        y_desc.store([m, n + HALF], narrow(right * scale[None, :], y_desc.dtype))


# ---- launchers


def quantize_matrices(
    ws: Sequence[Tensor], outs: Sequence[Tensor], scales: Sequence[Tensor] | None, specs: Sequence[RowQuant],
    enabled: Tensor | None = None, tile: dict | None = None,
) -> None:  # fmt: skip
    """One launch: contiguous ws (..., cols) -> outs, codes if there are scales to go with them, else ŵ."""
    programs, numbers, options = row_arguments(ws, specs, _ROW_TILES, tile)
    if programs:
        launch(
            _quantize_kernel, (programs,), ws[0].device,
            tuple(ws), tuple(outs), tuple(scales or outs), ws[0] if enabled is None else enabled, *numbers,
            CODES=scales is not None, SWITCH=enabled is not None, **options,
        )  # fmt: skip


def codes_linear(x: Tensor, codes: Tensor, scale: Tensor, tile: dict | None = None) -> Tensor:
    (m, k), n = x.shape, codes.shape[0]
    y = empty_rows((m, n), x.dtype, x.device)
    if y.numel() == 0 or k == 0:
        return y.zero_()
    tile = tile or _CODES_TILES.select(x.device, x.dtype, m)
    bm, bn, bk = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    grid = (min(num_programs(x.device), ceil_div(m, bm) * ceil_div(n, bn)),)
    operands = descriptor(x, (bm, bk)), descriptor(codes, (bn, bk)), scale, descriptor(y, (bm, bn // 2))
    launch(_codes_linear_kernel, grid, x.device, *operands, m, n, k, dot_precision(x.dtype), **tile)
    return y


# ---- custom ops


@torch.library.custom_op(
    add_op_namespace_prefix("quantize_rows"),
    mutates_args=(),
    schema=f"(Tensor w, *, ScalarType codes_dtype, bool by_kernel, {SPEC_SCHEMA}) -> (Tensor, Tensor)",
)
def _quantize(w, *, codes_dtype, by_kernel, **fields):
    """One opaque op, under torch.compile too: Inductor drops the round trip of the scale through fp16 and may divide
    approximately, and then training would not see the weights that are exported."""
    (spec,) = from_fields(**fields)
    if not by_kernel:
        codes, scale = quantize_rows_ref(w, spec)
        return codes.to(codes_dtype), scale
    codes, scale = _empty_codes(w, codes_dtype, **fields)
    quantize_matrices([w.contiguous()], [codes], [scale], [spec])
    return codes, scale


def _empty_codes(w, codes_dtype, *, scale_dtype, group_size, **_fields) -> tuple[Tensor, Tensor]:
    groups = () if group_size is None else (w.shape[-1] // group_size,)
    return w.new_empty(w.shape, dtype=codes_dtype), w.new_empty((*w.shape[:-1], *groups), dtype=scale_dtype)


@_quantize.register_fake
def _(w, *, codes_dtype, by_kernel, **fields):
    return _empty_codes(w, codes_dtype, **fields)


@torch.library.custom_op(
    add_op_namespace_prefix("fake_quantize_"),
    mutates_args=("outs",),
    schema=f"(Tensor[] ws, Tensor(a!)[] outs, Tensor? enabled, *, bool by_kernel, {SPEC_SCHEMA}) -> ()",
)
def _fake_quantize(ws, outs, enabled, *, by_kernel, **fields):
    specs = from_fields(**fields)
    if not by_kernel:
        for w, out, spec in zip(ws, outs, specs, strict=True):
            out.copy_(fake_quantize_rows_ref(w, spec, dtype=out.dtype, enabled=enabled))
        return
    direct = [out if out.is_contiguous() else out.new_empty(out.shape) for out in outs]
    quantize_matrices([w.contiguous() for w in ws], direct, None, specs, enabled)
    for out, value in zip(outs, direct, strict=True):
        if out is not value:
            out.copy_(value)


@_fake_quantize.register_fake
def _(ws, outs, enabled, **_fields):
    return None


@torch.library.custom_op(add_op_namespace_prefix("codes_linear"), mutates_args=())
def _codes_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return codes_linear(x, codes, scale)


@_codes_linear.register_fake
def _(x, codes, scale):
    return empty_rows((x.shape[0], codes.shape[0]), x.dtype, x.device)


@torch.library.custom_op(add_op_namespace_prefix("round_to_dtype"), mutates_args=())
def round_to_dtype(w: Tensor, dtype: torch.dtype) -> Tensor:
    """w after a round trip through `dtype`, without gradient, and one opaque op: Inductor removes such round trips."""
    return w.to(dtype, copy=True).to(w.dtype)


@round_to_dtype.register_fake
def _(w, dtype):
    return torch.empty_like(w)


# ---- public


def quantize_rows(w: Tensor, spec: RowQuant, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """w (..., rows, cols) -> int8 codes of w's shape and scale, (..., rows) or (..., rows, groups)."""
    _check("quantize_rows", w, spec)
    kernel = _runs_triton("quantize_rows", impl, w, spec)
    return _quantize(w.detach(), codes_dtype=torch.int8, by_kernel=kernel, **to_fields([spec]))


def dequantize_rows(
    codes: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32, group_size: int | None = None
) -> Tensor:
    """codes × scale in fp32, rounded once to `dtype`: what an artifact decodes to."""
    check_group("dequantize_rows", codes, group_size)
    shape = codes.shape[:-1] if group_size is None else (*codes.shape[:-1], codes.shape[-1] // group_size)
    if codes.dtype != torch.int8 or scale.dtype not in FLOAT_DTYPES or scale.shape != shape:
        raise ValueError(
            f"dequantize_rows: codes have shape {tuple(codes.shape)} and dtype {codes.dtype}, scale has "
            f"{tuple(scale.shape)} and {scale.dtype}; expected int8 codes and a float scale of shape {tuple(shape)}"
        )
    return decode_rows(codes, scale, dtype, group_size)


def fake_quantize_rows(
    w: Tensor,
    spec: RowQuant,
    out: Tensor | None = None,
    *,
    enabled: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """dequantize_rows(quantize_rows(w, spec)) in `dtype` (None: w's), rounded once, with straight-through gradient.

    With `out`, of w's shape and any float dtype (a bf16 compute copy of a fp32 master), the decoded weights are written
    there, rounded once from fp32, without gradient, and `out` is returned.
    """
    if dtype is not None and (out is not None or dtype not in FLOAT_DTYPES):
        raise ValueError(f"fake_quantize_rows: dtype={dtype}; expected None where out is given, else {FLOAT_DTYPES}")
    if out is not None:
        fake_quantize_banks([w], [out], spec, enabled=enabled, impl=impl)
        return out
    _check("fake_quantize_rows", w, spec, enabled)
    kernel = _runs_triton("fake_quantize_rows", impl, w, spec)
    return straight_through(w, _decoded(w, spec, dtype or w.dtype, enabled, kernel))


def fake_quantize_banks(
    ws: Sequence[Tensor],
    outs: Sequence[Tensor],
    specs: RowQuant | Sequence[RowQuant],
    *,
    enabled: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """fake_quantize_rows(w, spec, out) for each of ws and outs, with one spec for all or one each.

    One launch for all whose specs differ in bits only, in the order of the first of each.
    """
    if isinstance(ws, Tensor) or isinstance(outs, Tensor):
        raise ValueError("fake_quantize_banks: ws or outs is one Tensor; expected sequences of tensors")
    op = "fake_quantize_rows" if len(ws) == 1 else "fake_quantize_banks"
    if len(ws) != len(outs):
        raise ValueError(f"{op}: {len(ws)} weights and {len(outs)} outs; expected one out for each weight")
    specs = one_each(op, specs, len(ws))
    for w, out, spec in zip(ws, outs, specs, strict=True):
        _check(op, w, spec, enabled)
        check_floats(op, w=w, out=out)
        if out.shape != w.shape:
            raise ValueError(f"{op}: out has shape {tuple(out.shape)}; expected {tuple(w.shape)}, as w")
        if w.device != ws[0].device or w.dtype != ws[0].dtype:
            raise ValueError(
                f"{op}: weights in {ws[0].dtype} on {ws[0].device} and in {w.dtype} on {w.device}; use one of each"
            )
    with torch.no_grad():
        for members in by_launch(specs):
            fields = to_fields([specs[i] for i in members])
            kernel = _runs_triton("fake_quantize_rows", impl, ws[0], specs[members[0]])
            masters, copies = [ws[i].detach() for i in members], [outs[i] for i in members]
            _fake_quantize(masters, copies, enabled, by_kernel=kernel, **fields)


def fake_quant_linear(
    x: Tensor, w: Tensor, spec: RowQuant, *, form: Form = "auto", enabled: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """x ŵᵀ: x (..., K), w (N, K) -> (..., N) in x's dtype. ŵ is rounded from fp32 to x's dtype, once."""
    op = "fake_quant_linear"
    check_floats(op, x=x, w=w)
    check_linear(op, x, w)
    _check(op, w, spec, enabled)
    if form not in ("auto", "compute_copy", "codes"):
        raise ValueError(f"{op}: form={form!r}; expected 'auto', 'compute_copy' or 'codes'")
    per_row = spec.group_size is None and enabled is None
    if form == "codes" and not per_row:
        raise ValueError(f"{op}: form='codes' with group_size={spec.group_size}, enabled={enabled}; expected both None")
    x, lead = autocast(x), x.shape[:-1]
    kernel = _runs_triton("fake_quantize_rows", impl, w, spec)
    codes_kernel = form != "compute_copy" and per_row and _runs_triton("codes_linear", impl, x, spec, lead.numel())
    if form == "codes" or (codes_kernel and resolve("codes_linear", impl) == "auto"):
        dtype = x.dtype if codes_kernel else torch.int8
        codes, scale = _quantize(w.detach(), codes_dtype=dtype, by_kernel=codes_kernel, **to_fields([spec]))
        y = _CodesLinear.apply(x.reshape(lead.numel(), x.shape[-1]), w, codes, scale, codes_kernel)
        return y.reshape(*lead, w.shape[0])
    return F.linear(x, straight_through(w, _decoded(w, spec, x.dtype, enabled, kernel)))


def _decoded(w: Tensor, spec: RowQuant, dtype: torch.dtype, enabled: Tensor | None, kernel: bool) -> Tensor:
    """ŵ in `dtype`, without gradient."""
    out = w.new_empty(w.shape, dtype=dtype)
    _fake_quantize([w.detach()], [out], enabled, by_kernel=kernel, **to_fields([spec]))
    return out


def _runs_triton(op: str, impl: Impl, tensor: Tensor, spec: RowQuant, rows: int = 1 << 62) -> bool:
    """Of quantizing, "auto" knows no least number of rows: it is one launch for any."""
    return runs_triton(op, impl, tensor, rows) and stores_scale(op, resolve(op, impl), spec)


def _check(op: str, w: Tensor, spec: RowQuant, enabled: Tensor | None = None) -> None:
    check_floats(op, w=w)
    check_rows(op, "w", w, spec)
    if values_readable(w) and not torch.isfinite(w).all():
        index = (~torch.isfinite(w)).nonzero()[0].tolist()
        raise ValueError(f"{op}: w{index} = {w[tuple(index)].item()}; expected finite weights")
    if enabled is None:
        return
    if not isinstance(enabled, Tensor):
        raise ValueError(f"{op}: enabled={enabled!r}; expected None or a 0-d bool tensor, as torch.tensor(True)")
    if enabled.dtype != torch.bool or enabled.ndim or enabled.device != w.device:
        raise ValueError(
            f"{op}: enabled has dtype {enabled.dtype}, shape {tuple(enabled.shape)}, on {enabled.device}; "
            f"expected a 0-d bool tensor on {w.device}"
        )
