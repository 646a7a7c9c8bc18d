"""The Muon step: its kernels, its optimizer, and the same update however many ranks there are."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from dataclasses import replace

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels import RowQuant
from golfgpt_kernels import muon as kernels
from golfgpt_kernels.fake_quant import fake_quantize_rows_ref
from golfgpt_kernels.testing import poisoned, randn

from golfgpt.config import ModelConfig, OptimConfig
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.optim.flat import FlatGradients
from golfgpt.optim.optimizers import Muon, Optimizers

pytestmark = pytest.mark.numeric

SHAPES = [(2, 24, 40), (3, 40, 24), (0, 8, 8), (24, 40), (5, 1, 7)]
INT6 = RowQuant(bits=6)
SMALL = ModelConfig(vocab_size=64, num_layers=3, model_dim=24, num_heads=3, num_kv_heads=1, mlp_hidden=40)


def tensors(seed, dtype=torch.float32, device="cpu"):
    return [randn(*shape, seed=seed + i, dtype=dtype, device=device) for i, shape in enumerate(SHAPES)]


def scalar(value, device):
    return torch.full((), value, device=device)


# ---- kernels


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
            shadows = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
        scales = [1.0, 1.29, 1.0, 0.5, 2.0]
        gk.muon_update_(
            params, updates, scalar(0.02, device), scales=scales, weight_decay=decay, shadows=shadows, impl=impl
        )
        assert all(torch.equal(s, p.bfloat16()) for s, p in zip(shadows, params, strict=True))
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


def quantized_update(impl, device, dtype=torch.float32, specs=INT6, shadow_dtype=torch.bfloat16, **options):
    params, updates = hard_banks(device, dtype)
    with poisoned():
        shadows = [torch.empty_like(p, dtype=shadow_dtype) for p in params]
    gk.muon_update_(
        params, updates, scalar(0.02, device), scales=[1.0, 2.0, 1.29, 1.0, 0.5], weight_decay=0.1, shadows=shadows,
        specs=specs, impl=impl, **options,
    )  # fmt: skip
    return params, shadows


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("clip", ["max", "quantile"])
@pytest.mark.parametrize("bits", [5, 6, 8, [5, 6, 6, 8, 2]], ids=str)
def test_quantized_shadow_is_of_the_new_weight(bits, clip, impl, device):
    """Bit for bit what fake_quantize_rows makes of it."""
    plain, _ = quantized_update("eager", device)
    specs = [RowQuant(bits=n, clip=clip) for n in (bits if isinstance(bits, list) else [bits] * 5)]
    params, shadows = quantized_update(impl, device, specs=specs)
    for p, shadow, expected, spec in zip(params, shadows, plain, specs, strict=True):
        assert torch.equal(p, expected)  # it fuses no multiply-add, as eager does not
        assert torch.equal(shadow, fake_quantize_rows_ref(p, spec, dtype=torch.bfloat16))
    assert not torch.equal(shadows[0], params[0].bfloat16())


QUANTIZERS = {
    "full range, fp32 scales": RowQuant(bits=6, code_range="full", scale_dtype=torch.float32),
    "bf16 scales": RowQuant(bits=6, scale_dtype=torch.bfloat16, code_range="full", scale_floor=2**-14),
    "baseline's int8": RowQuant(bits=8, clip="quantile", scale_floor=1 / 127, codes_from="float32_scale"),
}


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", QUANTIZERS.values(), ids=QUANTIZERS.keys())
def test_quantizer_options(spec, dtype, impl, device):
    params, shadows = quantized_update(impl, device, dtype, spec, torch.float16)
    for p, shadow in zip(params, shadows, strict=True):
        assert torch.equal(shadow, fake_quantize_rows_ref(p, spec, dtype=torch.float16))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_quantizer_in_groups(impl, device):
    p, o = randn(3, 5, 48, device=device), randn(3, 5, 48, seed=1, device=device)
    shadow = torch.empty_like(p)
    spec = RowQuant(bits=4, group_size=12)
    gk.muon_update_([p], [o], scalar(0.02, device), scales=[1.0], shadows=[shadow], specs=spec, impl=impl)
    assert torch.equal(shadow, fake_quantize_rows_ref(p, spec))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_switched_off_and_guarded(impl, device):
    """Without `enabled` the shadow is the rounded weight; without `ok` it stays as it was."""
    off = torch.tensor(False, device=device)
    params, shadows = quantized_update(impl, device, enabled=off)
    assert all(torch.equal(s, p.bfloat16()) for s, p in zip(shadows, params, strict=True))
    params, shadows = quantized_update(impl, device, enabled=~off)
    assert torch.equal(shadows[0], fake_quantize_rows_ref(params[0], INT6, dtype=torch.bfloat16))
    params, shadows = quantized_update(impl, device, ok=off)
    assert all(torch.equal(p, before) for p, before in zip(params, hard_banks(device)[0], strict=True))
    assert all(s.isnan().all() for s in shadows)
    params, shadows = quantized_update(impl, device, ok=~off)
    assert torch.equal(shadows[0], fake_quantize_rows_ref(params[0], INT6, dtype=torch.bfloat16))


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
        gk.muon_update_, buffers, grads, scalar(0.1, device), scales=[1.0] * 5, shadows=outs, impl="triton"
    )
    quantized(specs=[RowQuant(bits=bits) for bits in (5, 6, 6, 8, 2)])
    assert len(launches) == 3
    specs = [INT6, None, RowQuant(bits=5), RowQuant(bits=5, clip="quantile"), None]
    quantized(specs=specs)
    assert len(launches) == 6, "a clip is a launch more, and rounding is"
    for w, shadow, spec in zip(buffers, outs, specs, strict=True):
        rounded = w.bfloat16() if spec is None else fake_quantize_rows_ref(w, spec, dtype=torch.bfloat16)
        assert torch.equal(shadow, rounded)


def test_a_quantizer_that_no_kernel_has_changes_nothing(device):
    """Also where the launch before it could have been made."""
    p, before = tensors(0, device=device)[:2], tensors(0, device=device)[:2]
    specs = [INT6, RowQuant(bits=6, scale_dtype=torch.float64)]
    with pytest.raises(RuntimeError, match=r"stores no scale in torch\.float64"):
        gk.muon_update_(
            p, before, scalar(0.1, device), scales=[1.0] * 2, shadows=[t.bfloat16() for t in p], specs=specs,
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
    gk.muon_update_(grads, outs, scalar(0.1, device), scales=[1.0] * 5, shadows=outs)
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
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], shadows=G, specs=6),
        r"spec=6 for params\[0\]; expected a RowQuant",
    ),
    "no shadows": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], specs=INT6),
        r"a spec for params\[0\] and no shadows; expected",
    ),
    "too few specs": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], shadows=G, specs=[]),
        "0 specs for 1 matrices",
    ),
    "groups": (
        lambda: gk.muon_update_(
            G, G, scalar(0.1, "cpu"), scales=[1.0], shadows=G, specs=RowQuant(bits=6, group_size=3)
        ),
        "group_size=3; expected None or a divisor of 4 columns",
    ),
    "switch": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], shadows=G, enabled=torch.ones(())),
        "enabled has dtype torch.float32",
    ),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the optimizer


def parameters(device="cpu", seed=0):
    shapes = [(2, 24, 40), (1, 24, 40), (40, 24)]
    return [torch.nn.Parameter(randn(*shape, seed=seed + i, device=device)) for i, shape in enumerate(shapes)]


def run(params, steps=3, grads=lambda step, i, p: randn(*p.shape, seed=100 * step + i, device=p.device), **options):
    optimizer = Muon(params, lr=0.02, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = grads(step, i, p)
        optimizer.step()
    return optimizer


def test_agrees_with_torch_muon():
    """torch.optim.Muon averages where this sums its momentum; orthogonalization makes them one."""
    ours, theirs = torch.nn.Parameter(randn(24, 40)), torch.nn.Parameter(randn(24, 40))
    run([ours], weight_decay=0.1)
    optimizer = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="original"
    )
    for step in range(3):
        theirs.grad = randn(24, 40, seed=100 * step)
        optimizer.step()
    moved = (theirs - randn(24, 40)).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # both iterate in bf16, with other roundings


@pytest.mark.parametrize("options", [{}, {"row_norm": True}, {"variance_beta": 0.9}], ids=str)
def test_kernels_agree_with_eager(options, device):
    """The iteration in fp32, where rounding does not drown the comparison."""
    results = []
    for impl in ("eager", "triton"):
        params = parameters(device)
        run(params, steps=2, impl=impl, dtype=torch.float32, weight_decay=0.1, **options)
        results.append(params)
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_equivariant_and_scale_invariant():
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    plain, permuted, scaled = (torch.nn.Parameter(torch.zeros(24, 40)) for _ in range(3))
    run([plain], dtype=torch.float32)
    run([permuted], dtype=torch.float32, grads=lambda step, i, p: randn(24, 40, seed=100 * step)[rows])
    run([scaled], dtype=torch.float32, grads=lambda step, i, p: 1e3 * randn(24, 40, seed=100 * step))
    torch.testing.assert_close(permuted, plain[rows], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)


def test_options_do_what_they_say():
    (row,), (variance,), (plain,) = ([torch.nn.Parameter(torch.zeros(24, 40))] for _ in range(3))
    uneven = torch.logspace(-3, 3, 24)[:, None]

    def grads(step, i, p):
        return randn(24, 40, seed=step) * uneven

    run([plain], steps=1, grads=grads, dtype=torch.float32)
    run([row], steps=1, grads=grads, row_norm=True, dtype=torch.float32)
    state = run([variance], steps=1, grads=grads, variance_beta=0.9, dtype=torch.float32).state[variance]

    def spread(p):
        return (p.norm(dim=1).max() / p.norm(dim=1).min()).item()

    assert spread(plain) > 10, "small rows are lost in five iterations"
    assert spread(row) < 2
    assert spread(variance) < 1.01
    assert variance.norm().item() == pytest.approx(plain.norm().item(), rel=1e-4)
    assert state["row_variance"].shape == (24, 1)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_compute_copies_follow(impl, device):
    params = parameters(device)
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in params}
    run(params, compute_copies=copies, impl=impl)
    assert all(torch.equal(copies[p], p.bfloat16()) for p in params)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_quantized_compute_copies_follow(impl, device):
    """Banks of one quantizer but other bits, and one bank without."""
    params = parameters(device)
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in params}
    quantizers = {params[0]: RowQuant(bits=6, clip="quantile"), params[2]: RowQuant(bits=5, clip="quantile")}
    run(params, compute_copies=copies, quantizers=quantizers, impl=impl)
    for p in params:
        spec = quantizers.get(p)
        expected = p.bfloat16() if spec is None else fake_quantize_rows_ref(p, spec, dtype=torch.bfloat16)
        assert torch.equal(copies[p], expected)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_matrix_moves_the_same_alone_and_in_banks(impl, device):
    """Each by its own norm: gradients of far apart sizes, in matrices of several parts of sums, reordered in banks."""
    weights, scale = randn(5, 50, 90, device=device), torch.logspace(-6, 4, 5, device=device)[:, None, None]
    gradients = randn(5, 50, 90, seed=1, device=device) * scale

    def step(*members):
        params = [torch.nn.Parameter(weights[i].clone()) for i in members]
        for i, p in zip(members, params, strict=True):
            p.grad = gradients[i].clone()
        other = torch.nn.Parameter(randn(90, 50, device=device))
        other.grad = randn(90, 50, seed=2, device=device)
        Muon([params[0], other, *params[1:]], lr=0.1, ns_steps=2, dtype=torch.float32, impl=impl).step()
        return params

    alone = torch.cat([p.detach().view(1, 50, 90) for i in range(5) for p in step(i)])
    for bank, i in zip(step([3, 4], 0, [2, 1]), ([3, 4], 0, [2, 1]), strict=True):
        torch.testing.assert_close(bank.detach(), alone[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row_norm", [False, True])
def test_launches_of_a_step(row_norm, device, monkeypatch):
    """Momentum, update, and of each of two shapes the normalization and three a step, with the norm's own launch where
    rows were divided since the momentum."""
    counted = []
    for module in (kernels, sys.modules["golfgpt_kernels.newton_schulz"]):
        launch = module.launch
        counting = lambda *args, launch=launch, **options: counted.append(launch(*args, **options))  # noqa: E731
        monkeypatch.setattr(module, "launch", counting)
    run(parameters(device), steps=1, impl="triton", row_norm=row_norm, ns_steps=2)
    assert len(counted) == 2 + 2 * (1 + row_norm + 3 * 2)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_gradient_is_refused(value):
    params = parameters()
    optimizer = run(params)
    before = [p.detach().clone() for p in params] + [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    params[1].grad[0, 3, 5] = value
    with pytest.raises(ValueError, match=r"of shape \(1, 24, 40\) is not finite; nothing was updated"):
        optimizer.step()
    after = [*params, *(optimizer.state[p]["momentum_buffer"] for p in params)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_refuses_vectors_and_skips_frozen():
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)
    frozen, live = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
    live.grad = randn(3, 4)
    Muon([frozen, live], lr=0.1).step()
    assert torch.equal(frozen, torch.ones(3, 4)) and not torch.equal(live, torch.ones(3, 4))


def test_large_finite_gradients_and_odd_parameters():
    """A 2-norm in fp16 overflows; an empty bank is stepped over, a second dtype apart; a bias leaves no group."""
    big, empty = torch.nn.Parameter(torch.zeros(8, 12)), torch.nn.Parameter(torch.zeros(0, 4, 4))
    half = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.float16))
    optimizer = Muon([big, empty, half], lr=0.1, impl="triton", variance_beta=0.9)
    for p in (big, empty, half):
        p.grad = torch.full_like(p, 2000.0)
    optimizer.step()
    assert big.any() and half.any()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    with pytest.raises(ValueError, match="got shape"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(4))]})
    assert len(optimizer.param_groups) == 1


def test_a_quantizer_needs_a_compute_copy_and_that_is_one_parameter_s_own():
    p, q = parameters()[:2]
    with pytest.raises(ValueError, match=r"a quantizer but no compute copy for a parameter of shape"):
        Muon([p, q], lr=0.1, quantizers={p: INT6})
    optimizer = Muon([p, q], lr=0.1, compute_copies={p: torch.zeros_like(p)})
    for parameter in (p, q):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert torch.equal(optimizer.compute_copies[p], p.detach())


def test_copies_are_whole():
    """Compute copies of a deep copy follow its parameters."""
    params = parameters()
    copies = {p: p.detach().bfloat16() for p in params}
    optimizer = run(params, compute_copies=copies, quantizers={p: INT6 for p in params}, dtype=torch.float32)
    again = copy.deepcopy(optimizer)
    for o in (optimizer, again):
        for i, p in enumerate(o.param_groups[0]["params"]):
            p.grad = randn(*p.shape, seed=i)
        o.step()
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        assert p is not q and torch.equal(p, q) and torch.equal(copies[p], again.compute_copies[q])


def test_default_dtype_is_not_asked():
    results = []
    for default in (torch.float32, torch.bfloat16):
        params = parameters()
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=i)
        torch.set_default_dtype(default)
        try:
            Muon(params, lr=0.02, variance_beta=0.9).step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_torch_state_dict_round_trip():
    params, again = parameters(), parameters()
    state = copy.deepcopy(run(params, variance_beta=0.9).state_dict())
    resumed = Muon(again, lr=0.02, variance_beta=0.9)
    for p, q in zip(params, again, strict=True):
        q.data.copy_(p)
    resumed.load_state_dict(state)
    optimizer = Muon(params, lr=0.02, variance_beta=0.9)
    optimizer.load_state_dict(copy.deepcopy(state))
    for o in (optimizer, resumed):
        for i, p in enumerate(o.param_groups[0]["params"]):
            p.grad = randn(*p.shape, seed=i)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


# ---- all groups, and ranks


def test_capture_needs_a_gpu_and_notices_changes():
    model, alone = GPT(SMALL), Ranks(0, 1, torch.device("cpu"))
    flat = FlatGradients(model, alone, sharded=False, control=0)
    optimizers = Optimizers(model, OptimConfig(), flat)
    with pytest.raises(RuntimeError, match="needs parameters on a GPU"):
        optimizers.capture()
    optimizers._graph, optimizers._captured = object(), optimizers._addresses()
    model.c_q.grad, kept = None, model.c_q.grad
    with pytest.raises(RuntimeError, match="changed after the step was captured"):
        optimizers.step(1.0, 0.9)
    model.c_q.grad = kept
    extra = torch.nn.Parameter(torch.zeros(3, 4))
    extra.grad = torch.zeros(3, 4)
    optimizers.muon.add_param_group({"params": [extra]})
    with pytest.raises(RuntimeError, match="changed after the step was captured"):
        optimizers.step(1.0, 0.9)


WORKER = """
import sys, torch
from golfgpt.distributed import start
sys.path.insert(0, {tests!r})
from test_muon import train_on
ranks = start("cpu")
torch.set_num_threads(1)
result = train_on(ranks, {sharded})
if ranks.is_main:
    torch.save(result, {out!r})
ranks.close()
"""


def train_on(ranks, sharded):
    """Weights after steps 1 and 20 and the state, of given gradients of which each rank holds a part."""
    model = GPT(SMALL)
    flat = FlatGradients(model, ranks, sharded=sharded, control=2)
    config = OptimConfig(weight_decay=0.01, muon_variance_beta=0.9)
    optimizers = Optimizers(model, config, flat)
    optimizers.muon.dtype = torch.float32
    generator = torch.Generator().manual_seed(0)
    weights, norms = {}, []
    for step in range(20):
        flat.zero_()
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator)
            shares = torch.rand(ranks.world, generator=torch.Generator().manual_seed(step))
            p.grad.copy_(g * shares[ranks.rank] / shares.sum())
        flat.control.fill_(1.0)
        flat.sum_()
        assert flat.control.tolist() == [ranks.world] * 2
        norms.append(flat.norm().item())
        optimizers.step(1.0 - step / 40, 0.9)
        if step in (0, 19):
            weights[step] = {k: v.clone() for k, v in model.state_dict().items()}
    state = optimizers.state()
    resumed = GPT(SMALL)
    flat = FlatGradients(resumed, ranks, sharded=sharded, control=2)
    again = Optimizers(resumed, config, flat)
    again.load_state(state)
    restored = again.state()
    assert all(torch.equal(value, restored[key]) for key, value in state.items())
    again.load_state({key: value for key, value in state.items() if not key.startswith("c_q.momentum")})
    partial = again.state()
    assert not partial["c_q.momentum_buffer"].any() and partial["attn_proj.momentum_buffer"].any()
    return weights, norms, state


@pytest.mark.slow
@pytest.mark.parametrize("world, sharded", [(2, False), (2, True), (3, False), (3, True)])
def test_update_does_not_depend_on_ranks(world, sharded, tmp_path):
    """Step 1 within 1e-6 and 20 steps within 1e-2, in float32; state in the same form."""
    out = tmp_path / "result.pt"
    file = tmp_path / "main.py"
    file.write_text(WORKER.format(tests=os.path.dirname(__file__), sharded=sharded, out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), file]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    weights, norms, state = torch.load(out)
    expected, expected_norms, expected_state = train_on(Ranks(0, 1, torch.device("cpu")), False)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for step, tolerance in ((0, 1e-6), (19, 1e-2)):
        for name, value in expected[step].items():
            assert (weights[step][name] - value).norm() <= tolerance * value.norm().clamp(min=1), (step, name)
    assert state.keys() == expected_state.keys()
    assert all(state[key].shape == value.shape for key, value in expected_state.items())


def test_padding_of_shards_stays_zero():
    model = GPT(replace(SMALL, num_layers=2))
    flat = FlatGradients(model, Ranks(1, 3, torch.device("cpu")), sharded=True, control=1)
    for stack in flat.stacks:
        real = sum(stack.counts)
        assert len(stack.gradients) % 3 == 0 and len(stack.shard) * 3 == len(stack.gradients)
        assert not stack.weights[real:].any()
        banks = {name: dict(model.named_parameters())[name] for name in stack.names}
        torch.testing.assert_close(flat.scatter(stack, banks), stack.shard.detach())


def test_bfloat16_embeddings_are_those_of_bfloat16_tensors():
    """Against torch's fused AdamW on a bfloat16 parameter, which keeps its moments in bfloat16 too."""
    model = GPT(ModelConfig(vocab_size=40, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1, mlp_hidden=16))
    optimizers = Optimizers(model, OptimConfig(embed_dtype="bfloat16", tied_embed_lr=0.03, weight_decay=0.04))
    expected = torch.nn.Parameter(model.tok_emb.detach().bfloat16())
    assert torch.equal(model.tok_emb.detach(), expected.detach().float())
    adam = torch.optim.AdamW([expected], lr=0.03, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.04, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 0.01
        expected.grad = model.tok_emb.grad.bfloat16()
        optimizers.step(1.0, 0.9)
        adam.step()
        assert torch.equal(model.tok_emb.detach(), expected.detach().float())
    assert torch.equal(optimizers.adam.state[model.tok_emb]["exp_avg"], adam.state[expected]["exp_avg"].float())
    model.tok_emb.grad = None
    optimizers.step(1.0, 0.9)
    assert torch.equal(model.tok_emb.detach(), expected.detach().float())
