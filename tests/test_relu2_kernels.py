"""The relu² MLP's kernels against float64, on a GPU or interpreted: values, gradients, edges, registration."""

from __future__ import annotations

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels._weight_grad import add_parts, weight_grad, weight_grad_parts
from golfgpt_kernels.relu2_mlp import linear_relu2_fwd, linear_relu2_ref, relu2_mlp_dz, relu2_mlp_ref
from golfgpt_kernels.testing import assert_within_budget, gradients, poisoned, randn

pytestmark = pytest.mark.numeric

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SLOPES = [0.0, 0.5]

# rows, K, H, N. Tiles are 32 x 32 x 32 and programs 3 when interpreting: "waves" gives each several tiles.
SHAPES = {
    "aligned": (64, 64, 64, 64),
    "ragged": (37, 129, 67, 51),
    "one row": (1, 512, 40, 33),
    "waves": (200, 96, 160, 64),
    "long K": (40, 544, 48, 32),
}


def mlp_inputs(shape, dtype, device, weight_dtype=torch.float32):
    m, k, h, n = shape
    return {
        "x": randn(m, k, seed=1, dtype=dtype, device=device),
        "w_fc": randn(h, k, seed=2, dtype=weight_dtype, device=device, scale=k**-0.5),
        "w_proj": randn(n, h, seed=3, dtype=weight_dtype, device=device, scale=h**-0.5),
    }


def check_against_eager(op, reference, inputs, grad, **options):
    """The kernel's output and gradients within the budget that eager's errors set."""
    with poisoned():
        ours = gradients(lambda **kw: op(**kw, **options, impl="triton"), inputs, grad)
    eager = gradients(lambda **kw: reference(**kw, **options), inputs, grad)
    exact = {name: value.to(inputs["x"].dtype).double() for name, value in inputs.items()}  # weights are rounded to x's
    oracle = gradients(lambda **kw: reference(**kw, **options), exact, grad.double())
    for name in oracle:
        assert_within_budget(ours[name], eager[name], oracle[name], name)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mlp_forward_and_gradients(shape, dtype, slope, device):
    inputs = mlp_inputs(shape, dtype, device)
    grad = randn(shape[0], shape[3], seed=4, dtype=dtype, device=device)
    check_against_eager(gk.relu2_mlp, relu2_mlp_ref, inputs, grad, negative_slope=slope)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_forward_and_gradients(dtype, slope, device):
    m, k, n, _ = SHAPES["ragged"]
    inputs = {"x": randn(m, k, seed=1, dtype=dtype, device=device), "w": randn(n, k, seed=2, device=device, scale=0.1)}
    grad = randn(m, n, seed=3, dtype=dtype, device=device)
    check_against_eager(gk.linear_relu2, linear_relu2_ref, inputs, grad, negative_slope=slope)


def big_tile(m, n, k):
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize("tile", [big_tile(64, 128, 32), big_tile(16, 32, 64)], ids=["large", "small"])
def test_other_tiles(tile, device):
    """Numbers do not depend on the tile beyond rounding, whichever a table holds."""
    inputs = mlp_inputs((70, 80, 90, 48), torch.float32, device)
    x, w_fc, w_proj = inputs.values()
    with poisoned():
        h = linear_relu2_fwd(x, w_fc, 0.5, tile)
        dz = relu2_mlp_dz(x[:, :48].contiguous(), w_proj, h, 0.5, tile)
        dw = add_parts(weight_grad_parts(dz, x, tile=tile), torch.float32)
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(h, linear_relu2_fwd(x, w_fc, 0.5), **close)
    torch.testing.assert_close(dz, relu2_mlp_dz(x[:, :48].contiguous(), w_proj, h, 0.5), **close)
    torch.testing.assert_close(dw, dz.T @ x, **close)


def test_weight_gradient_is_deterministic_and_fp32_from_half(device):
    """The sum over rows keeps fp32 to the end: rounding it to fp16 first would be off by 5e-4."""
    dy, x = (randn(700, 40, seed=s, dtype=torch.float16, device=device) for s in (1, 2))
    dw = weight_grad(dy, x, torch.float32)
    assert torch.equal(dw, weight_grad(dy, x, torch.float32))
    oracle = dy.double().T @ x.double()
    assert ((dw - oracle).norm() / oracle.norm()).item() < 1e-6


def test_partial_sums_fill_what_they_are_given(device):
    """More splits than there are blocks of rows, as for the last chunk of the loss: the rest are zeros."""
    dy, x = randn(70, 40, seed=1, device=device), randn(70, 24, seed=2, device=device)
    with poisoned():
        parts = weight_grad_parts(dy, x, torch.empty(7, 40, 24, device=device))
    assert parts[0].any() and not parts[-1].any()
    torch.testing.assert_close(add_parts(parts, torch.float32), dy.T @ x)


def test_no_inputs_to_sum(device):
    x, w = torch.empty(3, 0, device=device), torch.empty(5, 0, device=device)
    assert torch.equal(gk.linear_relu2(x, w, impl="triton"), torch.zeros(3, 5, device=device))


def test_expanded_grad_output(device):
    """A sum's gradient has stride 0."""
    inputs = mlp_inputs((33, 40, 24, 16), torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in inputs.values()]
    gk.relu2_mlp(*leaves, impl="triton").sum().backward()
    full = gradients(lambda **kw: gk.relu2_mlp(**kw, impl="triton"), inputs, torch.ones(33, 16, device=device))
    assert torch.equal(leaves[0].grad, full["x"])


def test_nonfinite_values_come_through(device):
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [-float("inf"), 1.0]], device=device)
    for slope in SLOPES:
        h = gk.linear_relu2(x, torch.eye(2, device=device), negative_slope=slope, impl="triton")
        assert h[0].isnan().any() and h[1, 0].isinf()
        assert h[2, 0] == (float("inf") if slope else 0.0) or h[2].isnan().any()  # 0 * inf in the matmul


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_travels_in_the_last_bit(dtype, device):
    """h of LeakyReLU² is within one ulp of the square, and its last bit is the sign of z. In fp32 the square itself
    has been rounded before."""
    z = randn(64, 64, seed=5, dtype=dtype, device=device, scale=2.0)
    z[0, :3] = torch.tensor([0.0, 1e-30, -1e-30], device=device).to(dtype)
    h = linear_relu2_fwd(z, torch.eye(64, dtype=dtype, device=device), 0.5)
    exact = torch.where(z > 0, z.double(), z.double() * 0.5).square()
    bits = h.contiguous().view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    assert torch.equal((bits & 1).bool(), z < 0)
    ulp = torch.finfo(dtype).eps * exact.clamp(min=torch.finfo(dtype).tiny)
    assert ((h.double() - exact).abs() <= ulp * (1.51 if dtype == torch.float32 else 1.01)).all()
