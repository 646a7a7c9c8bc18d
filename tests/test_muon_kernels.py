"""The kernels of the Muon step: momentum and update."""

from __future__ import annotations

import functools

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels import RowQuant
from golfgpt_kernels import muon as kernels
from golfgpt_kernels.fake_quant import fake_quantize_rows_ref
from golfgpt_kernels.testing import poisoned, randn

pytestmark = pytest.mark.numeric

SHAPES = [(2, 24, 40), (3, 40, 24), (0, 8, 8), (24, 40), (5, 1, 7)]
INT6 = RowQuant(bits=6)


def tensors(seed, dtype=torch.float32, device="cpu"):
    return [randn(*shape, seed=seed + i, dtype=dtype, device=device) for i, shape in enumerate(SHAPES)]


def scalar(value, device):
    return torch.full((), value, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_kernel(dtype, nesterov, device):
    results = []
    for impl in ("triton", "eager"):
        grads, buffers = tensors(0, device=device), tensors(10, device=device)
        with poisoned():
            outs = [torch.empty_like(g, dtype=dtype) for g in grads]
        gk.muon_momentum_(grads, buffers, outs, scalar(0.9, device), nesterov=nesterov, impl=impl)
        results.append(buffers + outs)
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=torch.finfo(ours.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [None, {"BLOCK": 8192, "num_warps": 4}], ids=["parts of a block", "more than one"])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_square_sums(dtype, tile, impl, device, monkeypatch):
    """Each of the elements of its part, as stored: a sum of what they were before would be off by a rounding."""
    if tile:
        monkeypatch.setattr(kernels._MOMENTUM_TILES, "select", lambda *_: tile)
    shapes = [*SHAPES, (2, 50, 97), (64, 64), (2, 0, 5)]
    grads = [randn(*shape, seed=i, device=device) for i, shape in enumerate(shapes)]
    buffers = [randn(*shape, seed=10 + i, device=device) for i, shape in enumerate(shapes)]
    with poisoned():
        outs = [torch.empty_like(g, dtype=dtype) for g in grads]
        sums = [torch.empty(*s[:-2], kernels.square_parts(*s[-2:]), device=device) for s in shapes]
    gk.muon_momentum_(grads, buffers, outs, scalar(0.9, device), square_sums=sums, impl=impl)
    assert [s.shape[-1] for s in sums] == [1, 1, 1, 1, 1, 3, 2, 0]
    for out, found in zip(outs, sums, strict=True):
        squares = out.double().square().flatten(-2).split(kernels.PART, -1)
        for i in range(found.shape[-1]):
            torch.testing.assert_close(found[..., i].double(), squares[i].sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_update_kernel(dtype, decay, device):
    results = []
    for impl in ("triton", "eager"):
        params, updates = tensors(0, device=device), tensors(10, dtype, device)
        with poisoned():
            copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
        scales = [1.0, 1.29, 1.0, 0.5, 2.0]
        gk.muon_update_(
            params, updates, scalar(0.02, device), scales=scales, weight_decay=decay, compute_copies=copies, impl=impl
        )
        assert all(torch.equal(s, p.bfloat16()) for s, p in zip(copies, params, strict=True))
        results.append(params)
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def hard_banks(device, dtype=torch.float32):
    """Parameters whose rows are hard to quantize after an update too, which is zero in some; one row is longer than a
    block, and widths are odd."""
    params, updates = [], []
    for i, shape in enumerate([(2, 6, 64), (0, 7, 8), (7, 33), (1, 6, 2500), (6, 1)]):
        w, o = (randn(*shape, seed=seed + i, device=device) for seed in (0, 20))
        scale = torch.tensor([1.0, 0.0, 1e-6, 1e3, 1.0, 1e-3, 1.0], device=device)[: shape[-2], None]
        params.append((w * scale).to(dtype))
        updates.append((o * scale).bfloat16())
    return params, updates


def quantized_update(impl, device, dtype=torch.float32, specs=INT6, copy_dtype=torch.bfloat16, **options):
    params, updates = hard_banks(device, dtype)
    with poisoned():
        copies = [torch.empty_like(p, dtype=copy_dtype) for p in params]
    gk.muon_update_(
        params, updates, scalar(0.02, device), scales=[1.0, 2.0, 1.29, 1.0, 0.5], weight_decay=0.1,
        compute_copies=copies, specs=specs, impl=impl, **options,
    )  # fmt: skip
    return params, copies


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("clip", ["max", "quantile"])
@pytest.mark.parametrize("bits", [5, 6, 8, [5, 6, 6, 8, 2]], ids=str)
def test_quantized_copy_is_of_the_new_weight(bits, clip, impl, device):
    """Bit for bit what fake_quantize_rows makes of it."""
    plain, _ = quantized_update("eager", device)
    specs = [RowQuant(bits=n, clip=clip) for n in (bits if isinstance(bits, list) else [bits] * 5)]
    params, copies = quantized_update(impl, device, specs=specs)
    for p, copy, expected, spec in zip(params, copies, plain, specs, strict=True):
        assert torch.equal(p, expected)  # it fuses no multiply-add, as eager does not
        assert torch.equal(copy, fake_quantize_rows_ref(p, spec, dtype=torch.bfloat16))
    assert not torch.equal(copies[0], params[0].bfloat16())


QUANTIZERS = {
    "full range, fp32 scales": RowQuant(bits=6, code_range="full", scale_dtype=torch.float32),
    "bf16 scales": RowQuant(bits=6, scale_dtype=torch.bfloat16, code_range="full", scale_floor=2**-14),
    "baseline's int8": RowQuant(bits=8, clip="quantile", scale_floor=1 / 127, codes_from="float32_scale"),
}


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", QUANTIZERS.values(), ids=QUANTIZERS.keys())
def test_quantizer_options(spec, dtype, impl, device):
    params, copies = quantized_update(impl, device, dtype, spec, torch.float16)
    for p, copy in zip(params, copies, strict=True):
        assert torch.equal(copy, fake_quantize_rows_ref(p, spec, dtype=torch.float16))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_quantizer_in_groups(impl, device):
    p, o = randn(3, 5, 48, device=device), randn(3, 5, 48, seed=1, device=device)
    copy = torch.empty_like(p)
    spec = RowQuant(bits=4, group_size=12)
    gk.muon_update_([p], [o], scalar(0.02, device), scales=[1.0], compute_copies=[copy], specs=spec, impl=impl)
    assert torch.equal(copy, fake_quantize_rows_ref(p, spec))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_switched_off_and_guarded(impl, device):
    """Without `enabled` the compute copy is the rounded weight; without `ok` it stays as it was."""
    off = torch.tensor(False, device=device)
    params, copies = quantized_update(impl, device, enabled=off)
    assert all(torch.equal(s, p.bfloat16()) for s, p in zip(copies, params, strict=True))
    params, copies = quantized_update(impl, device, enabled=~off)
    assert torch.equal(copies[0], fake_quantize_rows_ref(params[0], INT6, dtype=torch.bfloat16))
    params, copies = quantized_update(impl, device, ok=off)
    assert all(torch.equal(p, before) for p, before in zip(params, hard_banks(device)[0], strict=True))
    assert all(s.isnan().all() for s in copies)
    params, copies = quantized_update(impl, device, ok=~off)
    assert torch.equal(copies[0], fake_quantize_rows_ref(params[0], INT6, dtype=torch.bfloat16))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_guard_keeps_everything(impl, device):
    grads, buffers = [g * float("nan") for g in tensors(0, device=device)], tensors(10, device=device)
    outs, before = [torch.empty_like(g) for g in grads], [b.clone() for b in buffers]
    ok = torch.tensor(False, device=device)
    gk.muon_momentum_(grads, buffers, outs, scalar(0.9, device), ok=ok, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))
    gk.muon_update_(buffers, grads, scalar(0.1, device), scales=[1.0] * 5, ok=ok, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


def test_all_tensors_are_one_launch_each(device, monkeypatch):
    launches = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args, **kw: launches.append(args[0]) or launch(*args, **kw))
    grads, buffers = tensors(0, device=device), tensors(10, device=device)
    sums = [torch.empty(*g.shape[:-2], 1, device=device) for g in grads]
    outs = [g.bfloat16() for g in grads]
    gk.muon_momentum_(grads, buffers, outs, scalar(0.9, device), square_sums=sums, impl="triton")
    gk.muon_update_(buffers, grads, scalar(0.1, device), scales=[1.0] * 5, impl="triton")
    assert len(launches) == 2
    quantized = functools.partial(
        gk.muon_update_, buffers, grads, scalar(0.1, device), scales=[1.0] * 5, compute_copies=outs, impl="triton"
    )
    quantized(specs=[RowQuant(bits=bits) for bits in (5, 6, 6, 8, 2)])
    assert len(launches) == 3
    specs = [INT6, None, RowQuant(bits=5), RowQuant(bits=5, clip="quantile"), None]
    quantized(specs=specs)
    assert len(launches) == 6, "a clip is a launch more, and rounding is"
    for w, copy, spec in zip(buffers, outs, specs, strict=True):
        rounded = w.bfloat16() if spec is None else fake_quantize_rows_ref(w, spec, dtype=torch.bfloat16)
        assert torch.equal(copy, rounded)


def test_a_quantizer_that_no_kernel_has_changes_nothing(device):
    """Also where the launch before it could have been made."""
    p, before = tensors(0, device=device)[:2], tensors(0, device=device)[:2]
    specs = [INT6, RowQuant(bits=6, scale_dtype=torch.float64)]
    with pytest.raises(RuntimeError, match=r"stores no scale in torch\.float64"):
        gk.muon_update_(
            p, before, scalar(0.1, device), scales=[1.0] * 2, compute_copies=[t.bfloat16() for t in p], specs=specs,
            impl="triton",
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(p, before, strict=True))


def test_auto_asks_about_the_first_dtype(device, monkeypatch):
    """Measurements are of fp32 gradients and weights; the bf16 beside them has none of its own."""
    launches = []
    monkeypatch.setattr(kernels, "launch", lambda *args, **options: launches.append(args[0]))
    monkeypatch.setattr(kernels, "runs_triton", lambda op, impl, tensor, rows: tensor.dtype == torch.float32)
    grads, outs = tensors(0, device=device), tensors(1, torch.bfloat16, device)
    gk.muon_momentum_(grads, tensors(2, device=device), outs, scalar(0.9, device))
    gk.muon_update_(grads, outs, scalar(0.1, device), scales=[1.0] * 5, compute_copies=outs)
    assert len(launches) == 2
    gk.muon_update_(grads, [g.double() for g in grads], scalar(0.1, device), scales=[1.0] * 5)
    assert len(launches) == 2, "kernels do not compute in float64"


G = [randn(3, 4)]
REFUSED = {
    "shapes": (lambda: gk.muon_momentum_(G, [randn(4, 3)], G, scalar(0.9, "cpu")), r"buffers \[\(4, 3\)\]; expected"),
    "dtypes": (lambda: gk.muon_momentum_(G * 2, [G[0], G[0].half()], G * 2, scalar(0.9, "cpu")), "buffers have dtypes"),
    "integers": (lambda: gk.muon_update_(G, [G[0].int()], scalar(0.9, "cpu"), scales=[1.0]), "dtype torch.int32"),
    "scalar": (lambda: gk.muon_momentum_(G, G, G, torch.ones(1)), r"momentum has dtype torch.float32, shape \(1,\)"),
    "guard": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], ok=torch.ones(())),
        "ok has dtype torch.float32",
    ),
    "a number": (lambda: gk.muon_momentum_(G, G, G, 0.9), "momentum is a float; expected a 0-d torch.float32 tensor"),
    "nothing": (lambda: gk.muon_update_(G, G, None, scales=[1.0]), "lr is a NoneType; expected"),
    "scales": (lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[]), "0 scales for 1 params"),
    "shape of sums": (
        lambda: gk.muon_momentum_(G, G, G, scalar(0.9, "cpu"), square_sums=[torch.zeros(2)]),
        r"square_sums have shapes \[\(2,\)\] .*expected \[\(1,\)\] in torch.float32",
    ),
    "sums of vectors": (
        lambda: gk.muon_momentum_([G[0][0]], [G[0][0]], [G[0][0]], scalar(0.9, "cpu"), square_sums=[torch.zeros(1)]),
        r"outs have shapes \[\(4,\)\]; expected \(..., rows, cols\)",
    ),
    "bits": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], compute_copies=G, specs=6),
        r"spec=6 for params\[0\]; expected a RowQuant",
    ),
    "no compute copies": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], specs=INT6),
        r"a spec for params\[0\] and no compute_copies; expected",
    ),
    "too few specs": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], compute_copies=G, specs=[]),
        "0 specs for 1 matrices",
    ),
    "groups": (
        lambda: gk.muon_update_(
            G, G, scalar(0.1, "cpu"), scales=[1.0], compute_copies=G, specs=RowQuant(bits=6, group_size=3)
        ),
        "group_size=3; expected None or a divisor of 4 columns",
    ),
    "switch": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], compute_copies=G, enabled=torch.ones(())),
        "enabled has dtype torch.float32",
    ),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
