"""The quantizer's kernels: codes and decoded weights equal eager's bit for bit, as is promised: divisions and roundings
make them. The scaled matmul keeps the error budget."""

from __future__ import annotations

from dataclasses import replace

import golfgpt_kernels as gk
import pytest
import torch
import torch.nn.functional as F
from golfgpt_kernels import RowQuant, fake_quant
from golfgpt_kernels.fake_quant import codes_linear, fake_quant_linear_ref, fake_quantize_rows_ref, quantize_rows_ref
from golfgpt_kernels.testing import assert_within_budget, gradients, poisoned, randn, strided

pytestmark = pytest.mark.numeric

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INT6 = RowQuant(bits=6)


def hard_rows(cols, dtype=torch.float32, device="cpu", seed=0):
    """Gaussian rows, and the ones that quantizers get wrong."""
    w = randn(8, cols, seed=seed, dtype=torch.float32)
    w[1] = 0  # no scale
    w[2, 1:] *= 1e-6
    w[2, 0] = 1e3  # one outlier
    w[3] *= 1e-6  # scales below fp16's normal numbers
    w[4] *= 1e3
    w[5] = torch.arange(cols) % 63 - 31  # codes without rounding in 6 bits
    w[6] = (torch.arange(cols) % 125 - 62) / 2  # ties
    w[6, 0] = 31
    w[7] = 0.25  # the largest magnitude many times
    return w.to(device, dtype)


def assert_same_quantization(w, **options):
    spec = RowQuant(**options)
    with poisoned():
        codes, scale = gk.quantize_rows(w, spec, impl="triton")
        copy = gk.fake_quantize_rows(w, spec, impl="triton")
    expected_codes, expected_scale = quantize_rows_ref(w, spec)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(copy, fake_quantize_rows_ref(w, spec))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("clip", ["max", "quantile", "deviation"])
def test_bits_and_clip(bits, clip, device):
    deviations = 12.85 if clip == "deviation" else 0.0
    assert_same_quantization(hard_rows(100, device=device), bits=bits, clip=clip, deviations=deviations)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codes_from", ["stored_scale", "float32_scale"])
def test_dtypes(dtype, scale_dtype, codes_from, device):
    w = hard_rows(96, dtype, device)
    assert_same_quantization(w, bits=6, code_range="full", scale_dtype=scale_dtype, codes_from=codes_from)


# "two blocks": rows longer than a block when interpreting are read twice, the quantile's maxima merged across blocks
@pytest.mark.parametrize("cols", [1, 2, 3, 512, 1536, 2049, 4100], ids=lambda n: f"{n} columns")
def test_widths(cols, device):
    for clip in ("max", "quantile", "deviation"):
        options = dict(clip=clip, deviations=3.0 if clip == "deviation" and cols > 1 else 0.0, scale_floor=1 / 31)
        if cols > 1 or clip != "deviation":
            assert_same_quantization(hard_rows(cols, device=device), bits=6, **options)


def test_quantile_maxima_in_different_blocks(device):
    w = torch.zeros(3, 4100, device=device)
    w[0, [0, 4099]] = torch.tensor([2.0, -3.0], device=device)
    w[1, [4098, 4099]] = torch.tensor([2.0, 3.0], device=device)
    w[2, [5, 3000]] = torch.tensor([3.0, 3.0], device=device)
    assert_same_quantization(w, bits=8, clip="quantile", scale_dtype=torch.float32)


@pytest.mark.parametrize("group_size", [1, 8, 25])
def test_groups(group_size, device):
    assert_same_quantization(hard_rows(200, device=device), bits=5, group_size=group_size)


def test_saturated_scale(device):
    """Above fp16's 65504 the scale saturates, and so do the codes."""
    assert_same_quantization(torch.tensor([[1e6, -1e9, 3e38, 5.0]], device=device), bits=6)


@pytest.mark.parametrize("seed", range(10))
def test_any_weights(seed, device):
    rows, cols, bits, exponent = (
        int(torch.randint(*bounds, (), generator=torch.Generator().manual_seed(5 * seed + i)))
        for i, bounds in enumerate([(1, 6), (1, 81), (2, 9), (-12, 7)])
    )
    assert_same_quantization(
        randn(rows, cols, seed=seed, device=device, scale=10.0**exponent), bits=bits, clip="quantile"
    )


def banks(device):
    """Matrices as a model holds them: layers first, other widths, one of them empty."""
    shapes = [(2, 5, 64), (2, 3, 64), (7, 192), (0, 64), (2, 4, 33)]
    return [randn(*shape, seed=i, device=device) for i, shape in enumerate(shapes)]


BITS = [RowQuant(bits=bits) for bits in (5, 6, 8, 6, 4)]
MORE = [INT6, replace(INT6, clip="quantile"), RowQuant(bits=8), RowQuant(bits=5, clip="quantile"), INT6]


@pytest.mark.parametrize(
    "specs, count", [(INT6, 1), (BITS, 1), (MORE, 2)], ids=["one spec", "bits differ", "clips too"]
)
def test_banks_are_a_launch_for_all_that_differ_in_bits_only(specs, count, device, monkeypatch):
    ws, launches = banks(device), []
    launch = fake_quant.launch
    monkeypatch.setattr(fake_quant, "launch", lambda *args, **kw: launches.append(args[0]) or launch(*args, **kw))
    outs = [torch.full(w.shape, float("nan"), dtype=torch.bfloat16, device=device) for w in ws]
    gk.fake_quantize_banks(ws, outs, specs, impl="triton")
    assert len(launches) == count
    for w, out, spec in zip(ws, outs, specs if isinstance(specs, list) else [specs] * len(ws), strict=True):
        assert torch.equal(out, fake_quantize_rows_ref(w, spec, dtype=torch.bfloat16))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_strided_weight_and_out(impl, device):
    w = hard_rows(40, device=device)
    out = torch.zeros(40, 8, dtype=torch.float16, device=device).T
    assert gk.fake_quantize_rows(strided(w), INT6, out, impl=impl) is out
    assert torch.equal(out, fake_quantize_rows_ref(w, INT6, dtype=torch.float16))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_compute_dtype_with_gradient(impl, device):
    w = hard_rows(40, device=device).requires_grad_()
    w_hat = gk.fake_quantize_rows(w, INT6, dtype=torch.bfloat16, impl=impl)
    assert torch.equal(w_hat, fake_quantize_rows_ref(w.detach(), INT6, dtype=torch.bfloat16))
    w_hat.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_switched_off_the_copy_is_the_rounded_weight(impl, device):
    w, enabled = hard_rows(40, device=device), torch.tensor(False, device=device)
    for on in (False, True):
        enabled.fill_(on)
        copy = gk.fake_quantize_rows(w, INT6, torch.empty_like(w, dtype=torch.bfloat16), enabled=enabled, impl=impl)
        expected = fake_quantize_rows_ref(w, INT6, dtype=torch.bfloat16) if on else w.bfloat16()
        assert torch.equal(copy, expected)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_switching_on_recompiles_nothing(impl, device):
    torch.compiler.reset()
    x, w = randn(6, 32, seed=1, device=device), randn(8, 32, seed=2, device=device)
    enabled, graphs = torch.tensor(False, device=device), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda x, w: gk.fake_quant_linear(x, w, RowQuant(bits=3), enabled=enabled, impl=impl),
        fullgraph=True,
        backend=count,
    )
    off = step(x, w)
    enabled.fill_(True)
    on = step(x, w)
    assert len(graphs) == 1
    torch.testing.assert_close(off, F.linear(x, w))
    torch.testing.assert_close(on, fake_quant_linear_ref(x, w, RowQuant(bits=3)))
    assert not torch.allclose(on, off, atol=1e-3)


SHAPES = {
    "aligned": (64, 64, 64),
    "ragged": (37, 129, 67),
    "one row": (1, 512, 40),
    "waves": (200, 96, 160),
    "long K": (24, 544, 48),
}


@pytest.mark.parametrize("form", ["compute_copy", "codes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_forward_and_gradients(shape, dtype, form, device):
    m, k, n = shape
    inputs = {"x": randn(m, k, seed=1, dtype=dtype, device=device), "w": randn(n, k, seed=2, device=device)}
    grad = randn(m, n, seed=3, dtype=dtype, device=device)
    with poisoned():
        ours = gradients(lambda x, w: gk.fake_quant_linear(x, w, INT6, form=form, impl="triton"), inputs, grad)
    eager = gradients(lambda x, w: fake_quant_linear_ref(x, w, INT6), inputs, grad)
    codes, scale = quantize_rows_ref(inputs["w"], INT6)
    w_hat = codes.double() * scale.double().unsqueeze(-1)
    if form == "compute_copy":
        w_hat = w_hat.to(dtype).double()
    oracle = gradients(F.linear, {"input": inputs["x"].double(), "weight": w_hat}, grad.double())
    for name, exact in (("out", "out"), ("x", "input"), ("w", "weight")):
        assert_within_budget(ours[name], eager[name], oracle[exact], name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_are_exact_in_every_dtype(dtype, device):
    """Integers up to 128 and x of few bits: nothing rounds but the last store."""
    x = torch.randint(-8, 9, (33, 64), device=device).to(dtype)
    w = torch.randint(-128, 128, (40, 64), device=device).to(dtype)
    y = codes_linear(x, w, torch.ones(40, device=device))
    assert torch.equal(y, (x.double() @ w.double().T).to(dtype))


@pytest.mark.slow
def test_inductor_compiles_the_quantizer(device):
    """Inductor's own keyword arguments must not collide with the op's."""
    torch.compiler.reset()
    x, w = randn(9, 16, seed=1, device=device), randn(24, 16, seed=2, device=device)
    for impl in ("eager", "triton"):
        compiled = torch.compile(lambda x, w, impl=impl: gk.fake_quant_linear(x, w, INT6, impl=impl), fullgraph=True)
        torch.testing.assert_close(compiled(x, w), fake_quant_linear_ref(x, w, INT6))
        codes, scale = torch.compile(lambda w, impl=impl: gk.quantize_rows(w, INT6, impl=impl), fullgraph=True)(w)
        assert torch.equal(codes, quantize_rows_ref(w, INT6)[0]) and torch.equal(scale, quantize_rows_ref(w, INT6)[1])


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_codes_form_in_fp16_autocast_and_without_batch(impl, device):
    """Codes are not scaled yet when they are summed: 1024 x 127 exceeds fp16."""
    x, w = torch.ones(1024, device=device), torch.ones(8, 1024, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.float16):
        y = gk.fake_quant_linear(x, w, RowQuant(bits=8), form="codes", impl=impl)
    assert torch.equal(y, torch.full_like(y, 1024))
    y.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


def test_result_may_be_changed_in_place(device):
    """A ragged width has padded rows; a view would refuse."""
    x, w = randn(6, 24, seed=1, device=device), randn(9, 24, seed=2, device=device).requires_grad_()
    y = gk.fake_quant_linear(x, w, INT6, form="codes", impl="triton")
    y += 1
    torch.testing.assert_close(y, gk.fake_quant_linear(x, w, INT6, form="codes", impl="eager") + 1)


W = randn(5, 8)
REFUSED = {
    "counts": (lambda: gk.fake_quantize_banks([W], [W, W], INT6), "1 weights and 2 outs"),
    "specs": (lambda: gk.fake_quantize_banks([W, W], [W, W], [INT6]), "1 specs for 2 matrices; expected one for all"),
    "bits": (lambda: gk.fake_quantize_banks([W], [W], 6), "spec=6 for w; expected a RowQuant"),
    "mixed dtypes": (lambda: gk.fake_quantize_banks([W, W.half()], [W.clone(), W.clone()], INT6), "use one of each"),
    "form": (lambda: gk.fake_quant_linear(W, W, INT6, form="int8"), "form='int8'; expected"),
    "grouped codes": (
        lambda: gk.fake_quant_linear(W, W, RowQuant(bits=6, group_size=4), form="codes"),
        "'codes' with group_size=4",
    ),
    "dtype": (lambda: gk.fake_quantize_rows(W, INT6, dtype=torch.int8), r"dtype=torch\.int8; expected"),
    "switch": (lambda: gk.fake_quantize_rows(W, INT6, enabled=torch.tensor(1)), "enabled has dtype torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unsupported_scale_is_a_named_reason():
    with pytest.raises(RuntimeError, match=r"stores no scale in torch\.float64"):
        gk.quantize_rows(W, RowQuant(bits=6, scale_dtype=torch.float64), impl="triton")
