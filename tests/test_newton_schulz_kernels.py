"""Newton-Schulz kernels against float64, in the polynomial's own measures where bf16 amplifies roundings."""

from __future__ import annotations

import functools
import importlib

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels._coefficients import QUINTIC_COEFFICIENTS
from golfgpt_kernels._tiles import TABLES
from golfgpt_kernels.testing import assert_within_budget, poisoned, randn, strided

ns = importlib.import_module("golfgpt_kernels.newton_schulz")  # the package's attribute is the function

pytestmark = pytest.mark.numeric

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = {F16: 2**-10, BF16: 2**-7, F32: 2**-23}
A, B, C = QUINTIC_COEFFICIENTS
LARGER = {"BLOCK": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}

SHAPES = {
    "aligned": (2, 32, 64),
    "ragged": (1, 37, 83),
    "tall": (1, 83, 37),
    "tall aligned": (1, 64, 32),
    "square": (1, 45, 45),
    "one row": (12, 1, 9),
    "one column": (12, 9, 1),
    "batch": (4, 8, 12),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_dtype = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])


def triton(x, **options):
    """The kernels' result, from buffers full of NaN."""
    with poisoned():
        return gk.newton_schulz(x, impl="triton", **options)


def exact(x, **options):
    return gk.newton_schulz(x.double(), impl="eager", dtype=F64, eps=1e-30, **options)


def assert_mirrored(a, block=None):
    """What the kernel promises: a pair of tiles is computed once and stored twice, so that it mirrors bit for bit,
    whatever a product rounds. Within a tile on the diagonal it is the product's own symmetry: tensor cores sum x y and
    y x alike, a CPU's BLAS, with which the interpreter multiplies, need not."""
    block = block or TABLES["newton_schulz"].select(a.device, a.dtype, a.numel())["BLOCK"]
    tile_of = torch.arange(a.shape[-1], device=a.device) // (1 if a.is_cuda else block)
    pairs = tile_of[:, None] != tile_of
    assert torch.equal(a[..., pairs], a.mT[..., pairs])


# ---- the launchers, one by one


@each_shape
@each_dtype
def test_gram(shape, dtype, device):
    x = randn(*shape, dtype=dtype, device=device)
    x64, tall = x.double(), shape[1] > shape[2]
    with poisoned():
        a = ns.gram(x)
    rival, oracle = (x.mT @ x, x64.mT @ x64) if tall else (x @ x.mT, x64 @ x64.mT)
    assert_within_budget(a, rival, oracle)
    assert_mirrored(a)


def test_triangle_of_many_tiles(device):
    """Eleven rows of tiles: every pair is computed, and stored once."""
    x = randn(1, 330, 333, dtype=BF16, device=device)
    tile = {"BLOCK": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1}
    with poisoned():
        a = ns.gram(x, tile=tile)
    assert_within_budget(a, x @ x.mT, x.double() @ x.double().mT)
    assert_mirrored(a, tile["BLOCK"])


@each_dtype
@pytest.mark.parametrize("shape", [(2, 32), (2, 45), (12, 1)], ids=["aligned", "ragged", "1 x 1"])
def test_polynomial(shape, dtype, device):
    batch, size = shape
    half = randn(batch, size, size, dtype=dtype, device=device, scale=size**-0.5)
    a = torch.tril(half) + torch.tril(half, -1).mT
    with poisoned():
        p = ns.polynomial(a, B, C)
    assert_within_budget(p, B * a + (C * a) @ a, B * a.double() + C * a.double() @ a.double())
    assert_mirrored(p)


@each_shape
@each_dtype
def test_update(shape, dtype, device):
    x = randn(*shape, dtype=dtype, device=device)
    size, tall = min(shape[1:]), shape[1] > shape[2]
    half = randn(shape[0], size, size, seed=1, device=device, scale=size**-0.5)
    p = (half + half.mT).to(dtype)
    with poisoned():
        y = ns.update(x, p, A, dtype)
    x64, p64 = x.double(), p.double()
    rival, oracle = (A * x + x @ p, A * x64 + x64 @ p64) if tall else (A * x + p @ x, A * x64 + p64 @ x64)
    assert_within_budget(y, rival, oracle)
    with poisoned():
        assert torch.equal(ns.update(x, p, A, F32), y.float())  # rounded to x's dtype first


@pytest.mark.parametrize("shape", [(1, 70, 150), (150, 70)], ids=["wide", "tall"])
def test_larger_tiles(shape, device):
    """Blocks of 64 in each of the three: K is shorter than a block, a multiple of none, and blocks overhang."""
    x = randn(*shape, dtype=BF16, device=device).view(-1, *shape[-2:]) / 16
    x64, tall = x.double(), x.shape[1] > x.shape[2]
    oracle = x64.mT @ x64 if tall else x64 @ x64.mT
    with poisoned():
        a = ns.gram(x, tile=LARGER)
        p = ns.polynomial(a, B, C, tile=LARGER)
        y = ns.update(x, p, A, F32, tile=LARGER)
    assert_within_budget(a, oracle.bfloat16(), oracle)
    assert_within_budget(p, B * a + (C * a) @ a, B * a.double() + C * a.double() @ a.double())
    rival = A * x + (x @ p if tall else p @ x)
    assert_within_budget(y.bfloat16(), rival, A * x64 + (x64 @ p.double() if tall else p.double() @ x64))


@each_dtype
def test_normalize(dtype, device):
    for shape, x_dtype, scale in (((2, 40, 200), F32, 1.0), ((2, 70, 3), BF16, 1e4), ((1, 1, 5), F16, 1e-2)):
        x = randn(*shape, dtype=x_dtype, device=device, scale=scale)
        with poisoned():
            u = ns.normalize(x, dtype, 1e-7)
        oracle = x.double() / (torch.linalg.vector_norm(x.double(), dim=(1, 2), keepdim=True) + 1e-7)
        ulps = 4 if dtype == F32 else 0.51  # a GPU's approximate division; one rounding hides it
        torch.testing.assert_close(u.double(), oracle, rtol=ulps * EPS[dtype], atol=2**-25)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_given_square_sums(impl, device):
    """They stand for ‖x‖², whatever their number, and x is not asked: four times of it halves X0."""
    run = functools.partial(gk.newton_schulz, impl=impl, dtype=F32, steps=1)
    for shape in ((2, 40, 200), (70, 3), (2, 1, 5, 1)):
        x = randn(*shape, device=device)
        squares = x.double().square().flatten(-2)
        for parts in (1, 5):
            sums = torch.stack([part.sum(-1) for part in squares.tensor_split(parts, -1)], -1).to(F32)
            torch.testing.assert_close(run(x, square_sums=sums), run(x))
            halved = gk.newton_schulz(x / 2, impl="eager", dtype=F32, steps=1, square_sums=sums)
            torch.testing.assert_close(run(x, square_sums=4 * sums), halved)
        for same in (sums.repeat_interleave(2, -1)[..., ::2], sums.double()):
            torch.testing.assert_close(run(x, square_sums=same), run(x, square_sums=sums))


@pytest.mark.parametrize("sums", [torch.ones(()), torch.ones(2, 0), torch.ones(1, 3), torch.ones(2, 1, dtype=BF16)])
def test_square_sums_are_refused_by_shape(sums):
    with pytest.raises(ValueError, match=r"square_sums have shape .*; expected \(2, 'P'\) with P >= 1 in one of"):
        gk.newton_schulz(randn(2, 3, 4), square_sums=sums)


# ---- the op


@each_dtype
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=["of fp32", "of bf16", "of fp16"])
def test_op_within_budget(x_dtype, dtype, device):
    for shape in ((2, 24, 40), (40, 24)):
        x = randn(*shape, dtype=x_dtype, device=device)
        y = triton(x, dtype=dtype, steps=2)
        rival = gk.newton_schulz(x, impl="eager", dtype=dtype, steps=2)
        assert_within_budget(y, rival, exact(x, steps=2))
        assert torch.equal(y, y.to(dtype).to(x_dtype))


@pytest.mark.parametrize("name", ["ragged", "tall", "square", "one row", "batch"])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express", "polar_express_5"])
def test_op_is_a_map_of_singular_values(name, coefficients, device):
    """bf16 amplifies roundings, so Y is near U s(S) Vᵀ as a whole, which its subspaces must be too, and in each σ."""
    x = randn(*SHAPES[name], device=device)[:2]
    y, oracle = triton(x, coefficients=coefficients).double(), exact(x, coefficients=coefficients)
    assert (y - oracle).norm() <= 0.1 * oracle.norm()  # 0.059 at worst
    difference = torch.linalg.svdvals(y) - torch.linalg.svdvals(oracle)
    assert difference.abs().max() <= 0.1


HOSTILE = {
    "zero": torch.zeros(8, 12),
    "rank 1": randn(32, 1) @ randn(1, 32, seed=1),
    "one dominant": torch.diag(torch.tensor([1e4] + [1e-4] * 15)),
    "1e-8": randn(24, 16, scale=1e-8),
    "1e4": randn(16, 16, scale=1e4),
    "zero among others": torch.stack((randn(8, 12), torch.zeros(8, 12))),
}


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("x", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_spectra(x, coefficients, impl, device):
    x = x.to(device)
    for dtype in (BF16, F16, F32):
        with poisoned():
            y = gk.newton_schulz(x, coefficients=coefficients, dtype=dtype, impl=impl)
        s = torch.linalg.svdvals(y)
        assert s.isfinite().all() and s.max() <= 1.3
        assert not y[(x == 0).all(-1)].any()  # a zero row, and a zero matrix, stays zero
        rank = min(torch.linalg.matrix_rank(x.double()).max(), 1)
        assert s.max() >= 0.6 * rank or x.norm() < 1e-5  # below that, eps is most of the divisor


def test_any_strides(device):
    """Close and not equal: a GPU adds squares in the order in which threads read them."""
    run = functools.partial(triton, steps=1, dtype=F32)
    x = randn(2, 2, 20, 33, device=device)
    y = run(x)
    torch.testing.assert_close(run(strided(x)), y)
    torch.testing.assert_close(run(x.mT.contiguous().mT), y)
    torch.testing.assert_close(run(x.transpose(0, 1)), y.transpose(0, 1))
    torch.testing.assert_close(run(x[0, 0].expand(2, 20, 33)), y[0, 0].expand(2, 20, 33))
    shifted = x[0, :, :, 1:]  # rows that start off 16 bytes
    torch.testing.assert_close(run(shifted), run(shifted.clone()))


def test_matrices_of_a_batch_do_not_touch(device):
    """Not beyond ragged edges either: a matrix comes out the same alone, and next to one of NaN. Bit for bit, since
    every tile is multiplied as a tile of the same size whatever the batch; eager does not promise it."""
    run = functools.partial(triton, steps=1)
    x = randn(3, 37, 41, device=device)
    y = run(x)
    assert torch.equal(run(x[1]), y[1])
    x[1] = float("nan")
    beside_nan = run(x)
    assert torch.equal(beside_nan[::2], y[::2])
    assert beside_nan[1].isnan().all()


def test_empty(device):
    for shape in ((0, 4, 5), (3, 0, 5), (4, 0), (2, 0, 4, 5)):
        assert triton(torch.zeros(shape, device=device)).shape == shape


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)], ids=["wide", "tall"])
def test_scale_transpose_and_row_permutation(shape, device):
    x = randn(*shape, device=device)
    permutation = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in (BF16, F32):
        run = functools.partial(triton, dtype=dtype, steps=3)
        y = run(x)
        assert torch.equal(run(x * 2.0**10), y)  # the exponent drops out; the norm is far above eps
        amplified = 16 * EPS[dtype]
        assert (run(x[permutation]) - y[permutation]).abs().max() <= amplified
        assert (run(x.mT) - y.mT).abs().max() <= amplified


def test_launches(device, monkeypatch):
    """Two for the norm, or one if the squares are given; three per step, whatever the batch; x stays as it is."""
    launched = []
    launch = ns.launch
    monkeypatch.setattr(ns, "launch", lambda *args, **options: launched.append(launch(*args, **options)))
    x = randn(4, 8, 8, device=device)
    before = x.clone()
    triton(x, steps=3)
    assert len(launched) == 2 + 3 * 3
    launched.clear()
    triton(x, steps=3, square_sums=x.square().sum(-1))
    assert len(launched) == 1 + 3 * 3
    assert torch.equal(x, before)


# ---- gradient


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 9, 5)], ids=["wide", "tall"])
def test_gradient_is_eager(shape, device):
    """Bit for bit: backward is the same operations, run again."""
    x, dy = randn(*shape, device=device), randn(*shape, seed=1, device=device)
    options = dict(steps=2, coefficients="polar_express")
    grads = []
    for impl in ("triton", "eager"):
        leaf = x.clone().requires_grad_()
        gk.newton_schulz(leaf, impl=impl, **options).backward(dy)
        grads.append(leaf.grad)
        leaf = x.clone().requires_grad_()
        sums = leaf.square().flatten(-2)  # gradients do not go through them
        gk.newton_schulz(leaf, impl=impl, square_sums=sums, **options).backward(dy)
        grads.append(leaf.grad)
        assert sums.requires_grad and not gk.newton_schulz(x, impl=impl, square_sums=sums, **options).requires_grad
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_gradient_is_the_slope_of_the_kernels(device):
    x, dy, along = (randn(6, 10, seed=seed, device=device) for seed in range(3))
    run = functools.partial(gk.newton_schulz, steps=2, dtype=F32, impl="triton")
    leaf = x.clone().requires_grad_()
    run(leaf).backward(dy)
    h = 1e-2
    slope = ((run(x + h * along) - run(x - h * along)) * dy).sum() / (2 * h)
    torch.testing.assert_close((leaf.grad * along).sum(), slope, rtol=2e-3, atol=0)


# ---- refusals and tables


def test_float64_is_refused_by_name(device):
    x = randn(4, 6, device=device)
    for options in ({"x": x.double()}, {"x": x, "dtype": F64}):
        with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: .*not in torch.float64; impl='eager' can"):
            gk.newton_schulz(impl="triton", **options)
        gk.newton_schulz(**options)


def test_small_results_get_small_tiles(monkeypatch):
    monkeypatch.setattr("golfgpt_kernels._tiles.compute_capability", lambda device: 90)
    select = functools.partial(TABLES["newton_schulz"].select, torch.device("cpu"), BF16)
    assert select(9 * 256 * 256)["BLOCK"] == 64
    assert select(9 * 512 * 512)["BLOCK"] == 128


# ---- lists

LISTS = {
    "one shape": [(2, 16, 24), (3, 16, 24)],
    "tall and wide": [(2, 16, 24), (1, 24, 16)],
    "tall alone": [(2, 24, 16), (1, 16, 16)],
    "equal smaller sides": [(2, 16, 24), (1, 40, 16), (2, 16, 16), (8, 24)],
    "ragged": [(2, 5, 7), (7, 5), (3, 5, 9)],
    "empty": [(0, 4, 6), (2, 4, 6)],
    "none": [],
}


@each_dtype
@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("given", [False, True], ids=["", "square sums"])
def test_a_list_is_orthogonalized_in_place(shapes, given, dtype, device):
    xs = [randn(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes)]
    sums = [x.float().square().flatten(-2).sum(-1, keepdim=True) for x in xs] if given else None
    ours, rival = ([x.clone() for x in xs] for _ in range(2))
    with poisoned():
        gk.newton_schulz_(ours, steps=3, dtype=dtype, square_sums=sums, impl="triton")
    gk.newton_schulz_(rival, steps=3, dtype=dtype, square_sums=sums, impl="eager")
    for x, a, b in zip(xs, ours, rival, strict=True):
        if x.numel():
            assert_within_budget(a, b, exact(x, steps=3))


def test_lists_that_cannot_be_changed_in_place(device):
    x = randn(4, 6, device=device)
    for xs in ([x, x.bfloat16()], [x.T]):
        with pytest.raises(ValueError, match=r"newton_schulz_: xs are .*; expected contiguous tensors of one dtype"):
            gk.newton_schulz_(xs)
