"""Newton-Schulz orthogonalization of batches of matrices: the polar factor U Vᵀ of X = U S Vᵀ, approximately.

    X0 = X / (‖X‖_F + eps)      A = X Xᵀ      X ← a X + (b A + c A²) X      `steps` times

Each step maps every singular value σ to a σ + b σ³ + c σ⁵ and leaves U and V alone. Shapes: (..., M, N)
-> the same; a tall matrix (M > N) is iterated as its transpose, so that A has the smaller side.

coefficients "quintic": (3.4445, -4.7750, 2.0315) at every step, steepest at zero; singular values end in
about 0.68 to 1.2, not at 1. "polar_express": the published list, one triple per step, the last repeated;
singular values converge to 1. A tuple (a, b, c), or one triple per step, is taken as given.

Precision: the norm and the division in fp32 (float64 if X or `dtype` is), then the iteration in `dtype`,
every operation rounded to it, matmuls accumulated in fp32. The polynomial is b A + (c A) A, the order
that the published code rounds in: other orders differ by up to 3.5e-2 in bf16. The result has X's dtype, with
values rounded to `dtype`.

Backward: autograd through the iteration. With P = b A + c A², Y = a X + P X, both A and P symmetric, a step is
    dP = dY Xᵀ      dA = b dP + c (dP A + A dP)      dX = a dY + P dY + (dA + dAᵀ) X

`square_sums` (..., P), fp32 or float64: sums of squares of any P ≥ 1 parts of each x, which add up to ‖x‖². They must
be of x as given, after its rounding, as muon_momentum_ has them, which wrote x; nothing checks it, and x is not read
for its norm. They change no gradient: it is that of the ‖x‖ computed from x.

A zero matrix stays zero. With ‖X‖_F below about 100 eps, X0 has visibly less than unit norm.

Kernels. Two launches for X0, one with `square_sums`; three per step for any batch:
- X0: sums of squares per tile of X unless they are given, then every program adds its matrix's sums in one order
  and divides: the norm is deterministic. X is read by pointers here, with any strides, and only here.
- symmetric: A = X Xᵀ, then P = b A + c A Aᵀ. Tiles on and below the diagonal are computed; one below it is
  stored a second time, transposed. Within a tile on the diagonal x y and y x round alike on a GPU, which sums every
  element over k in one order, so that A and P are exactly symmetric; interpreted, that is up to the CPU's BLAS.
- update: a X + P X.
A list of batches (newton_schulz_, for optimizers) is iterated together: batches of one shape, tall or wide, share every
launch, batches with equal smaller sides share the polynomial's.
A tall X is never transposed: A = Xᵀ X is read from X as it lies (wgmma takes either order of a 16-bit
operand) and the update is a X + X P, since A and P are symmetric. A, P and a step's X are rounded once each,
where eager rounds b A, c A, their products and sums one by one: in bf16 the result is about twice as close to
float64's. fp32 operands are multiplied as torch.set_float32_matmul_precision says. Backward recomputes the
iteration in eager PyTorch.

Left out on purpose: one persistent launch for all steps, whose programs would wait for each other (the
interpreter runs them one by one, and they must all be resident); the iteration on the Gram matrix alone,
which is unstable in bf16 without restarts and gains nothing for square matrices.

Sources: K. Jordan et al., Muon (kellerjordan.github.io/posts/muon), 2024; Amsel, Persson, Musco, Gower,
"The Polar Express", arXiv:2505.16932, appendix A. Computing half of X Xᵀ and storing it twice, and Xᵀ X for
tall matrices, are ideas of the kernels by byronxu99 (dion, modded-nanogpt).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._coefficients import Coefficients, Triple, per_step
from ._dispatch import FLOAT_DTYPES, KERNEL_DTYPES, Impl, accumulate_dtype, check_floats, runs_triton
from ._jit import addressable, ceil_div, descriptor, dot, dot_precision, empty_rows, jit, launch, narrow, tl
from ._ops import add_op_namespace_prefix
from ._tiles import Tile, TileTable


def newton_schulz_ref(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
    square_sums: Tensor | None = None,
) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    u = (x.mT if tall else x).to(torch.promote_types(accumulate_dtype(x.dtype), dtype))
    if square_sums is None or (x.requires_grad and torch.is_grad_enabled()):  # the gradient goes through the norm too
        norm = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
    else:
        norm = square_sums.to(u.dtype).sum(-1).sqrt()[..., None, None]
    u = (u / (norm + eps)).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        for a, b, c in per_step(coefficients, steps):
            gram = u @ u.mT
            u = a * u + (b * gram + (c * gram) @ gram) @ u
    return (u.mT if tall else u).to(x.dtype)


# ---- tiles


# Square, for mirrored stores; the update takes the same. Tiles of 64 do 32 flops per byte that they read from L2, tiles
# of 128 do 64: at 5.5 TB/s 180 and 350 TF/s. The small ones are for results of which the large ones would leave an
# H100's multiprocessors idle. Before sm_90 a descriptor's loads become loads of single elements, whose addresses fill
# the registers that a larger tile would need.
_SMALL = 128 * 128 * 128

_TILES = TileTable(
    "newton_schulz",
    "elements of the result",
    Tile(sm=0, itemsize=2, launch={"BLOCK": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}),
    Tile(sm=0, itemsize=4, launch={"BLOCK": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}),
    Tile(sm=80, itemsize=2, launch={"BLOCK": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
    Tile(sm=80, itemsize=4, launch={"BLOCK": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}),
    Tile(sm=90, itemsize=2, launch={"BLOCK": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}, max_size=_SMALL),
    Tile(sm=90, itemsize=2, launch={"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
    Tile(sm=90, itemsize=4, launch={"BLOCK": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}),
)
_NORM_BLOCK = (32, 128)


# ---- kernels: the matrix is the slow part of a program's index, so that programs side by side share operands in L2


@jit
def _norm_tile(
    x_ptr,
    M, N, stride_b, stride_m, stride_n, tiles, tiles_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The program's matrix, rows and columns, which of them exist, and x there in fp32."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = (tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n = (tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)
    inside = (m < M) & (n < N)
    x = tl.load(x_ptr + matrix * stride_b + m * stride_m + n * stride_n, mask=inside, other=0.0)
    return matrix, m, n, inside, x.to(tl.float32)


@jit
def _squares_kernel(
    x_ptr, squares_ptr,
    M, N, stride_b, stride_m, stride_n, tiles, tiles_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    _, _, _, _, x = _norm_tile(x_ptr, M, N, stride_b, stride_m, stride_n, tiles, tiles_n, BLOCK_M, BLOCK_N)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(x * x))


@jit
def _normalize_kernel(
    x_ptr, squares_ptr, u_ptr, eps,
    M, N, stride_b, stride_m, stride_n, tiles, tiles_n, u_stride_b, u_stride_m, parts,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    matrix, m, n, inside, x = _norm_tile(x_ptr, M, N, stride_b, stride_m, stride_n, tiles, tiles_n, BLOCK_M, BLOCK_N)
    index = tl.arange(0, PARTS)
    norm = tl.sqrt_rn(tl.sum(tl.load(squares_ptr + matrix * parts + index, mask=index < parts, other=0.0)))
    u = narrow(x / (norm + eps), u_ptr.dtype.element_ty)  # within 2 ulp of fp32
    tl.store(u_ptr + matrix * u_stride_b + m * u_stride_m + n, u, mask=inside)


@jit
def _symmetric_kernel(
    x_desc, a_desc, out_desc, b, c,
    K, tiles,
    TALL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, S, S) = X Xᵀ with X (B, S, K), or Xᵀ X with X (B, K, S) if TALL; b A + c X Xᵀ if there is an A."""
    matrix = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    # Tile i (i + 1) / 2 + j is (i, j), j <= i. In fp32 that is exact below 2048 rows of tiles.
    i = ((tl.sqrt_rn((8 * tile + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    j = tile - i * (i + 1) // 2
    row = i * BLOCK
    col = j * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if TALL:
            left = x_desc.load([matrix, k, row]).reshape(BLOCK_K, BLOCK).T
            right = x_desc.load([matrix, k, col]).reshape(BLOCK_K, BLOCK)
        else:
            left = x_desc.load([matrix, row, k]).reshape(BLOCK, BLOCK_K)
            right = x_desc.load([matrix, col, k]).reshape(BLOCK, BLOCK_K).T
        acc = dot(left, right, acc, PRECISION)
    if a_desc is not None:
        acc = b * a_desc.load([matrix, row, col]).reshape(BLOCK, BLOCK).to(tl.float32) + c * acc
    out = narrow(acc, out_desc.dtype)
    out_desc.store([matrix, row, col], out.reshape(1, BLOCK, BLOCK))
    if i != j:
        out_desc.store([matrix, col, row], out.T.reshape(1, BLOCK, BLOCK))


@jit
def _update_kernel(
    left_desc, right_desc, x_desc, out_desc, a,
    K, tiles, tiles_n,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, M, N) = a X + L R with L (B, M, K) and R (B, K, N), rounded to X's dtype first if out has another."""
    matrix = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tile // tiles_n * BLOCK
    col = tile % tiles_n * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        left = left_desc.load([matrix, row, k]).reshape(BLOCK, BLOCK_K)
        right = right_desc.load([matrix, k, col]).reshape(BLOCK_K, BLOCK)
        acc = dot(left, right, acc, PRECISION)
    acc += a * x_desc.load([matrix, row, col]).reshape(BLOCK, BLOCK).to(tl.float32)
    out = narrow(acc, x_desc.dtype)
    if out_desc.dtype != x_desc.dtype:
        out = narrow(out.to(tl.float32), out_desc.dtype)
    out_desc.store([matrix, row, col], out.reshape(1, BLOCK, BLOCK))


# ---- launchers: (B, M, N), none of them empty, checked by the public function


def normalize(
    x: Tensor, dtype: torch.dtype, eps: float, squares: Tensor | None = None, u: Tensor | None = None
) -> Tensor:
    """x / (‖x‖_F + eps) in `dtype`, into u if it is given; x has any strides, `squares` (B, P) fp32 are contiguous."""
    batch, m, n = x.shape
    u = empty_rows(x.shape, dtype, x.device) if u is None else u
    tiles_n = ceil_div(n, _NORM_BLOCK[1])
    tiles = ceil_div(m, _NORM_BLOCK[0]) * tiles_n
    shape = m, n, *x.stride(), tiles, tiles_n
    if squares is None:
        squares = torch.empty((batch, tiles), dtype=torch.float32, device=x.device)
        launch(_squares_kernel, (batch * tiles,), x.device, x, squares, *shape, *_NORM_BLOCK, num_warps=4)
    parts = squares.shape[1]
    options = *u.stride()[:2], parts, 1 << (parts - 1).bit_length(), *_NORM_BLOCK
    launch(_normalize_kernel, (batch * tiles,), x.device, x, squares, u, eps, *shape, *options, num_warps=4)
    return u


def gram(x: Tensor, tile: dict | None = None, out: Tensor | None = None) -> Tensor:
    """x xᵀ, or xᵀ x of a tall x: (B, S, S), S the smaller side; into `out` (from `empty_rows`) if it is given."""
    return _symmetric(x, None, 0.0, 1.0, tile, out)


def polynomial(a: Tensor, b: float, c: float, tile: dict | None = None) -> Tensor:
    """b A + c A² of symmetric A (B, S, S)."""
    return _symmetric(a, a, b, c, tile)


def _symmetric(x: Tensor, a: Tensor | None, b: float, c: float, tile: dict | None, out: Tensor | None = None) -> Tensor:
    batch, size, k = x.shape[0], min(x.shape[1:]), max(x.shape[1:])
    out = empty_rows((batch, size, size), x.dtype, x.device) if out is None else out
    tile = tile or _TILES.select(x.device, x.dtype, out.numel())
    block, block_k, tall = tile["BLOCK"], tile["BLOCK_K"], x.shape[1] > x.shape[2]
    side = ceil_div(size, block)
    tiles = side * (side + 1) // 2
    x_desc = descriptor(x, (1, block_k, block) if tall else (1, block, block_k))
    a_desc = None if a is None else descriptor(a, (1, block, block))
    operands = x_desc, a_desc, descriptor(out, (1, block, block)), b, c
    options = k, tiles, tall, dot_precision(x.dtype)
    launch(_symmetric_kernel, (batch * tiles,), x.device, *operands, *options, **tile)
    return out


def update(
    x: Tensor, p: Tensor, a: float, dtype: torch.dtype, tile: dict | None = None, out: Tensor | None = None
) -> Tensor:
    """a x + p x, or a x + x p of a tall x, rounded to x's dtype and then to `dtype`; into `out` if it is given."""
    batch, m, n = x.shape
    out = empty_rows(x.shape, dtype, x.device) if out is None else out
    tile = tile or _TILES.select(x.device, x.dtype, out.numel())
    block, block_k = tile["BLOCK"], tile["BLOCK_K"]
    left, right = (x, p) if m > n else (p, x)
    tiles_n = ceil_div(n, block)
    tiles = ceil_div(m, block) * tiles_n
    operands = (
        descriptor(left, (1, block, block_k)), descriptor(right, (1, block_k, block)),
        descriptor(x, (1, block, block)), descriptor(out, (1, block, block)), a,
    )  # fmt: skip
    options = min(m, n), tiles, tiles_n, dot_precision(x.dtype)
    launch(_update_kernel, (batch * tiles,), x.device, *operands, *options, **tile)
    return out


def iterate(
    us: Sequence[Tensor], triples: Sequence[Triple], dtype: torch.dtype, outs: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """The steps from batches u, normalized and in the iteration's dtype, to the results in `dtype`. Batches with equal
    smaller sides share the launches of the polynomial. `outs` of a batch are as long together: each gets its part of
    the result, if kernels can write it; the parts are returned.

    Every step allocates: the caching allocator hands it what the step before last has freed.
    """
    us, by_side, results = list(us), {}, [[] for _ in us]
    for i, u in enumerate(us):
        by_side.setdefault(min(u.shape[1:]), []).append(i)
    for step, (a, b, c) in enumerate(triples, 1):
        for side, members in by_side.items():
            counts = [len(us[i]) for i in members]
            grams = empty_rows((sum(counts), side, side), us[members[0]].dtype, us[members[0]].device)
            for i, part in zip(members, grams.split(counts), strict=True):
                gram(us[i], out=part)
            for i, p in zip(members, polynomial(grams, b, c).split(counts), strict=True):
                if step < len(triples):
                    us[i] = update(us[i], p, a, us[i].dtype)
                    continue
                parts = [len(out) for out in outs[i]]
                for x, p_part, out in zip(us[i].split(parts), p.split(parts), outs[i], strict=True):
                    fits = out.shape == x.shape and addressable(out)
                    results[i].append(update(x, p_part, a, dtype, out=out if fits else None))
    return results


def orthogonalize_(
    xs: Sequence[Tensor], triples: Sequence[Triple], dtype: torch.dtype, eps: float, squares: Sequence[Tensor]
) -> None:
    """Replace each batch x (B, M, N) by its result. Batches of one shape are iterated as one, tall ones whose wide
    shape is there as their transposes. `squares` may be empty."""
    shapes = [tuple(x.shape[1:]) for x in xs]
    turned = [m > n and (n, m) in shapes for m, n in shapes]
    stacks: dict[tuple[int, int], list[int]] = {}
    for i, (shape, turn) in enumerate(zip(shapes, turned, strict=True)):
        stacks.setdefault(shape[::-1] if turn else shape, []).append(i)
    us = []
    for shape, members in stacks.items():
        counts = [len(xs[i]) for i in members]
        us.append(empty_rows((sum(counts), *shape), dtype, xs[0].device))
        for i, part in zip(members, us[-1].split(counts), strict=True):
            normalize(xs[i].mT if turned[i] else xs[i], dtype, eps, squares[i] if squares else None, part)
    results = iterate(us, triples, xs[0].dtype, [[xs[i] for i in members] for members in stacks.values()])
    for members, parts in zip(stacks.values(), results, strict=True):
        for i, part in zip(members, parts, strict=True):
            if part is not xs[i]:
                xs[i].copy_(part.mT if turned[i] else part)


# ---- custom op and its gradient


@torch.library.custom_op(add_op_namespace_prefix("newton_schulz"), mutates_args=())
def _newton_schulz(
    x: Tensor, coefficients: list[float], dtype: torch.dtype, eps: float, square_sums: Tensor | None = None
) -> Tensor:
    if x.numel() == 0:
        return empty_rows(x.shape, x.dtype, x.device)
    u = normalize(x, dtype, eps, square_sums)
    return iterate([u], _triples(coefficients), x.dtype, [[empty_rows(x.shape, x.dtype, x.device)]])[0][0]


@torch.library.custom_op(add_op_namespace_prefix("newton_schulz_"), mutates_args=("xs",))
def _newton_schulz_(
    xs: list[Tensor], coefficients: list[float], dtype: torch.dtype, eps: float, square_sums: list[Tensor]
) -> None:
    orthogonalize_(xs, _triples(coefficients), dtype, eps, square_sums)


@_newton_schulz_.register_fake
def _(xs, coefficients, dtype, eps, square_sums):
    return None


@_newton_schulz.register_fake
def _(x, coefficients, dtype, eps, square_sums=None):
    return empty_rows(x.shape, x.dtype, x.device)


def _triples(flat: Sequence[float]) -> list[Triple]:
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def _save(ctx, inputs, output):
    x, coefficients, ctx.dtype, ctx.eps, _ = inputs
    ctx.triples = _triples(coefficients)
    ctx.save_for_backward(x)


@once_differentiable  # it detaches x: a second derivative would be wrong, and is an error
def _backward(ctx, dy):
    with torch.enable_grad():
        x = ctx.saved_tensors[0].detach().requires_grad_()
        y = newton_schulz_ref(x, steps=len(ctx.triples), coefficients=ctx.triples, dtype=ctx.dtype, eps=ctx.eps)
    return torch.autograd.grad(y, x, dy)[0], None, None, None, None


_newton_schulz.register_autograd(_backward, setup_context=_save)


# ---- public


def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
    square_sums: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Approximately orthogonal x (..., M, N), in x's dtype; the iteration runs in `dtype`.

    `square_sums` (..., P) in fp32 or float64 are added up to ‖x‖² of each matrix instead of x's own squares.
    """
    triples = _check(
        "newton_schulz", [x], steps, coefficients, dtype, eps, None if square_sums is None else [square_sums]
    )
    if not _by_kernel(x, dtype, impl):
        square_sums = None if square_sums is None else square_sums.detach()
        return newton_schulz_ref(x, steps=steps, coefficients=triples, dtype=dtype, eps=eps, square_sums=square_sums)
    squares = None if square_sums is None else _flat_squares(square_sums)
    flat = [float(value) for triple in triples for value in triple]
    return _newton_schulz(_flat_batch(x), flat, dtype, eps, squares).reshape(x.shape)


@torch.no_grad()
def newton_schulz_(
    xs: Sequence[Tensor],
    *,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
    square_sums: Sequence[Tensor] | None = None,
    impl: Impl = "auto",
) -> None:
    """Replace each contiguous x (..., M, N) of a list, all of one dtype, by newton_schulz(x). Kernels take fewer
    launches than one by one: matrices with equal smaller sides share them where they can. No gradients."""
    op = "newton_schulz_"
    triples = _check(op, xs, steps, coefficients, dtype, eps, square_sums)
    if len({x.dtype for x in xs}) > 1 or not all(x.is_contiguous() for x in xs):
        kinds = [f"{x.dtype} with strides {x.stride()}" for x in xs]
        raise ValueError(f"{op}: xs are {', '.join(kinds)}; expected contiguous tensors of one dtype")
    if not xs:
        return
    if not _by_kernel(xs[0], dtype, impl):
        for x, squares in zip(xs, square_sums or [None] * len(xs), strict=True):
            options = {"steps": steps, "coefficients": triples, "dtype": dtype, "eps": eps, "square_sums": squares}
            x.copy_(newton_schulz_ref(x, **options))
        return
    full = [i for i, x in enumerate(xs) if x.numel()]
    batches = [xs[i].view(-1, *xs[i].shape[-2:]) for i in full]
    flat = [float(value) for triple in triples for value in triple]
    _newton_schulz_(batches, flat, dtype, eps, [_flat_squares(square_sums[i]) for i in full] if square_sums else [])


def _check(
    op: str,
    xs: Sequence[Tensor],
    steps: int,
    coefficients: Coefficients,
    dtype: torch.dtype,
    eps: float,
    square_sums: Sequence[Tensor] | None,
) -> list[Triple]:
    """Raises ValueError for what an op cannot take. Returns the coefficients of each step."""
    check_floats(op, **{"x" if len(xs) == 1 else f"xs[{i}]": x for i, x in enumerate(xs)})
    for x in xs:
        if x.ndim < 2:
            raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (..., M, N)")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: dtype={dtype}; expected one of {FLOAT_DTYPES}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{op}: steps={steps!r}; expected an integer >= 1")
    if not eps > 0:
        raise ValueError(f"{op}: eps={eps}; expected a positive number (zero matrices divide by it)")
    for x, squares in zip(xs, [] if square_sums is None else square_sums, strict=square_sums is not None):
        check_floats(op, x=x, square_sums=squares)
        lead, wide = x.shape[:-2], (torch.float32, torch.float64)
        fits = squares.ndim == x.ndim - 1 and squares.shape[:-1] == lead and squares.shape[-1] > 0
        if squares.dtype not in wide or not fits:
            raise ValueError(
                f"{op}: square_sums have shape {tuple(squares.shape)} and dtype {squares.dtype}; "
                f"expected {(*lead, 'P')} with P >= 1 in one of {wide}"
            )
    return per_step(coefficients, steps)


def _by_kernel(x: Tensor, dtype: torch.dtype, impl: Impl) -> bool:
    """Kernels take neither x nor the iteration in float64. No matrix is too small for them: they save launches."""
    computed = x.new_empty(0, dtype=dtype if x.dtype in KERNEL_DTYPES else x.dtype)
    return runs_triton("newton_schulz", impl, computed, 1 << 62)


def _flat_batch(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def _flat_squares(square_sums: Tensor) -> Tensor:
    batch = square_sums.shape[:-1].numel()
    return square_sums.detach().reshape(batch, square_sums.shape[-1]).float().contiguous()
