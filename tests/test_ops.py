"""What all ops promise: strides, empty input, missing gradients, autocast, torch.compile; and every op that the package
registers under `torch.library.opcheck`: schema, mutation, fake tensors, autograd."""

from __future__ import annotations

import itertools
import math
from functools import partial

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels._jit import MISSING
from golfgpt_kernels._ops import add_op_namespace_prefix, ops
from golfgpt_kernels._rows import to_fields
from golfgpt_kernels.softcap_logprobs import softcap_logprobs
from golfgpt_kernels.testing import assert_within_budget, gradients, poisoned, randn, strided

import golfgpt.model  # noqa: F401  the trainer registers no op of its own

NAMESPACE = add_op_namespace_prefix("")
REGISTERED = sorted(
    name.removeprefix(NAMESPACE) for name in torch._C._dispatch_get_all_op_names() if name.startswith(NAMESPACE)
)
SPECS = [gk.RowQuant(bits=bits, clip="quantile", code_range="full") for bits in (6, 5, 6)]
QUINTIC = [3.4445, -4.7750, 2.0315]
triton = pytest.mark.skipif(MISSING is not None, reason="without triton no kernel runs")


INT6 = gk.RowQuant(bits=6)
QUANTIZED = {form: partial(gk.fake_quant_linear, spec=INT6, form=form) for form in ("compute_copy", "codes")}
LAYERS = {
    "linear_relu2": gk.linear_relu2,
    "relu2_mlp": partial(gk.relu2_mlp, negative_slope=0.5),
    "fake_quant_linear": QUANTIZED["compute_copy"],
    "codes_linear": QUANTIZED["codes"],
    "softcap_cross_entropy": partial(gk.softcap_cross_entropy, reduction="none", z_loss=0.1),
    "token_logprobs": gk.token_logprobs,
}
MATRICES = {
    "newton_schulz": partial(gk.newton_schulz, steps=2, dtype=torch.float32),
    "fake_quantize_rows": partial(gk.fake_quantize_rows, spec=INT6),
    "quantize_rows": partial(gk.quantize_rows, spec=gk.RowQuant(bits=6, clip="quantile")),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def layer_inputs(name: str, lead: tuple[int, ...], device: str) -> dict[str, torch.Tensor]:
    """x (*lead, 24), weights, and targets of shape lead where there are some."""
    inputs = {"x": randn(*lead, 24, seed=1, device=device), "w": randn(41, 24, seed=2, device=device, scale=0.2)}
    if name == "relu2_mlp":
        inputs["w_proj"] = randn(9, 41, seed=3, device=device, scale=0.2)
    if name in ("softcap_cross_entropy", "token_logprobs"):
        inputs["targets"] = torch.arange(math.prod(lead), device=device).view(lead) * 7 % 41
    return inputs


def layer(name: str, impl: str):
    return lambda **inputs: LAYERS[name](*inputs.values(), impl=impl)


@triton
@each_layer
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,), (4, 0)], ids=str)
def test_leading_dimensions(name, lead, device):
    """Kernel and eager agree for any, also in the gradients, which are zero where there is no row."""
    inputs = layer_inputs(name, lead, device)
    shape = lead if "targets" in inputs else (*lead, 9 if name == "relu2_mlp" else 41)
    ours, eager = (
        gradients(layer(name, impl), inputs, torch.ones(shape, device=device)) for impl in ("triton", "eager")
    )
    assert ours["out"].shape == shape
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@triton
@each_layer
@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_any_strides(name, layout, device):
    """Operands that TMA cannot address are copied, and a kernel computes the same bits; torch's products, in the
    backward and in relu2_mlp's forward, may round otherwise. Gaps of the buffers are NaN."""
    inputs = layer_inputs(name, (33,), device)
    change = {
        "strided": strided,
        "transposed": lambda t: t.T.contiguous().T,
        "offset": lambda t: torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape),
    }[layout]
    moved = {k: change(v) if v.is_floating_point() else v.repeat_interleave(2)[::2] for k, v in inputs.items()}
    grad = randn(*layer(name, "eager")(**inputs).shape, seed=4, device=device)
    with poisoned():
        plain = gradients(layer(name, "triton"), inputs, grad)
        other = gradients(layer(name, "triton"), moved, strided(grad))
    assert name == "relu2_mlp" or torch.equal(other["out"], plain["out"])
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(name, "eager")(**moved), layer(name, "eager")(**inputs))


@triton
@each_layer
def test_gradients_where_needed_only(name, device):
    inputs = layer_inputs(name, (33,), device)
    floats = [key for key, value in inputs.items() if value.is_floating_point()]
    out = layer(name, "triton")(**inputs)
    full = gradients(layer(name, "triton"), inputs, torch.ones_like(out))
    for wanted in itertools.product([False, True], repeat=len(floats)):
        leaves = inputs | {k: inputs[k].clone().requires_grad_(want) for k, want in zip(floats, wanted, strict=True)}
        out = layer(name, "triton")(**leaves)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.sum().backward()
        for key, want in zip(floats, wanted, strict=True):
            assert torch.equal(leaves[key].grad, full[key]) if want else leaves[key].grad is None


@triton
@each_layer
def test_autocast_rounds_like_linear(name, device):
    inputs = layer_inputs(name, (9,), device)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, eager = (layer(name, impl)(**inputs) for impl in ("triton", "eager"))
    assert ours.dtype == eager.dtype == (torch.float32 if "targets" in inputs else torch.bfloat16)
    if name in ("fake_quant_linear", "codes_linear"):  # float64 weights would be quantized otherwise
        torch.testing.assert_close(ours, eager)
    else:
        exact = {k: v.bfloat16().double() if v.is_floating_point() else v for k, v in inputs.items()}
        assert_within_budget(ours, eager, layer(name, "eager")(**exact))


@triton
@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("name", [*LAYERS, *MATRICES])
def test_compiles_as_one_graph(name, impl, device):
    torch.compiler.reset()
    op = LAYERS.get(name) or MATRICES[name]
    inputs = layer_inputs(name, (2, 9), device) if name in LAYERS else {"x": randn(2, 6, 11, device=device)}
    leaves = [[t.clone().requires_grad_(t.is_floating_point()) for t in inputs.values()] for _ in range(2)]
    runs = torch.compile(partial(op, impl=impl), fullgraph=True, backend="aot_eager"), partial(op, impl=impl)
    compiled, plain = (run(*each) for run, each in zip(runs, leaves, strict=True))
    torch.testing.assert_close(compiled, plain)
    if isinstance(plain, torch.Tensor):
        for out in (compiled, plain):
            (out * 2).square().sum().backward()
        for ours, theirs in zip(*leaves, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


# ---- opcheck


def leaf(*shape: int, seed: int, device: str) -> torch.Tensor:
    return randn(*shape, seed=seed, device=device).requires_grad_()


# Each yields the op's (arguments, keyword arguments).


def linear_relu2(device):
    yield (leaf(9, 16, seed=0, device=device), leaf(24, 16, seed=1, device=device), 0.0, False), {}


def relu2_mlp(device):
    x, w_fc, w_proj = (
        leaf(*shape, seed=seed, device=device) for seed, shape in enumerate([(9, 16), (24, 16), (8, 24)])
    )
    yield (x, w_fc, w_proj, 0.5, False), {}


def relu2_dz(device):
    h = randn(9, 24, device=device).square()
    yield (h, h, 0.0), {}


def relu2_mlp_dz(device):
    dy, w_proj, h = (randn(*shape, seed=seed, device=device) for seed, shape in enumerate([(9, 8), (8, 24), (9, 24)]))
    yield (dy, w_proj, h.square(), 0.0, False), {}


def weight_grad_parts(device):
    yield (randn(9, 24, device=device), randn(9, 16, seed=1, device=device)), {}


def newton_schulz(device):
    for shape in ((1, 6, 8), (1, 10, 5), (0, 3, 4)):  # wide, tall and ragged, empty
        x = leaf(*shape, seed=0, device=device)
        for sums in (None, x.detach().square().sum(-1)):
            yield (x, QUINTIC, torch.bfloat16, 1e-7, sums), {}


def muon_banks(seed: int, device: str) -> list[torch.Tensor]:
    shapes = [(2, 3, 5), (4, 6), (7, 4)]
    return [randn(*shape, seed=seed + i, device=device) for i, shape in enumerate(shapes)]


def muon_momentum_(device):
    grads, buffers, outs = (muon_banks(seed, device) for seed in (0, 10, 20))
    momentum, ok = torch.tensor(0.9, device=device), torch.tensor(True, device=device)
    yield (grads, buffers, outs, [], momentum, True, ok), {}
    sums = [torch.empty(*grad.shape[:-2], 1, device=device) for grad in grads]
    yield (grads, buffers, outs, sums, momentum, True, None), {}


def muon_update_args(device):
    params, updates = muon_banks(10, device), muon_banks(0, device)
    return params, updates, torch.tensor(0.9, device=device), [1.0] * 3, 0.1, [p.bfloat16() for p in params]


def muon_update_(device):
    yield (*muon_update_args(device), None), {}


def muon_update_rows_(device):
    yes = torch.tensor(True, device=device)
    yield (*muon_update_args(device), yes, yes), to_fields(SPECS)


def softcap_logprobs_args(softcap, device):
    hidden, weight = leaf(9, 16, seed=0, device=device), leaf(40, 16, seed=1, device=device)
    return hidden, weight, torch.arange(9, device=device) % 40, softcap, -100


def softcap_logprobs_(device):
    for softcap in (30.0, None):
        yield softcap_logprobs_args(softcap, device), {}


def newton_schulz_(device):
    xs = [randn(2, *shape, seed=i, device=device) for i, shape in enumerate([(16, 24), (24, 16), (16, 16)])]
    squares = [x.square().sum(-1) for x in xs]
    for sums in (squares, []):
        yield ([x.clone() for x in xs], QUINTIC * 2, torch.float32, 1e-7, sums), {}


def softcap_logprobs_backward(device):
    for softcap, *needs in itertools.product((30.0, None), (False, True), (False, True)):
        args = softcap_logprobs_args(softcap, device)
        logprob, lse, low = (t.detach() for t in softcap_logprobs(*args))
        hidden, weight = (t.detach() for t in args[:2])
        yield (hidden, weight, args[2], lse, low, logprob, lse, softcap, -100, *needs), {}


def quantize_rows(device, by_kernel=True):
    w = randn(9, 24, device=device)
    for weight in (w, w.T.contiguous().T, w[None]):
        yield (weight,), dict(to_fields(SPECS[:1]), codes_dtype=torch.int8, by_kernel=by_kernel, group_size=4)


def fake_quantize_(device, by_kernel=True):
    w = randn(9, 24, device=device)
    outs = [torch.empty_like(w, dtype=torch.bfloat16), torch.empty(24, 9, device=device).T]
    yield ([w, w], outs, None), dict(to_fields(SPECS[:2]), by_kernel=by_kernel)


def codes_linear(device):
    x, w = randn(5, 24, seed=1, device=device), randn(9, 24, device=device)
    codes, scale = gk.quantize_rows(w, SPECS[0], impl="eager")
    yield (x, codes.to(x.dtype), scale), {}


def round_to_dtype(device):
    w = randn(2, 9, 24, device=device)
    yield (w, torch.float16), {}
    yield (w.mT, torch.float32), {}


CASES = {
    "codes_linear": codes_linear,
    "fake_quantize_": fake_quantize_,
    "linear_relu2": linear_relu2,
    "muon_momentum_": muon_momentum_,
    "muon_update_": muon_update_,
    "muon_update_rows_": muon_update_rows_,
    "newton_schulz": newton_schulz,
    "newton_schulz_": newton_schulz_,
    "quantize_rows": quantize_rows,
    "relu2_dz": relu2_dz,
    "relu2_mlp": relu2_mlp,
    "relu2_mlp_dz": relu2_mlp_dz,
    "round_to_dtype": round_to_dtype,
    "softcap_logprobs": softcap_logprobs_,
    "softcap_logprobs_backward": softcap_logprobs_backward,
    "weight_grad_parts": weight_grad_parts,
}


def test_every_op_has_a_case_and_the_package_s_namespace():
    assert sorted(CASES) == REGISTERED
    elsewhere = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("golfgpt")]
    assert [name for name in elsewhere if not name.startswith(NAMESPACE)] == []


@triton
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, device):
    for args, options in CASES[name](device):
        torch.library.opcheck(getattr(ops, name), args, options)


@pytest.mark.parametrize("case", [quantize_rows, fake_quantize_], ids=["quantize_rows", "fake_quantize_"])
def test_opcheck_of_the_reference_behind_the_op(case, device):
    for args, options in case(device, by_kernel=False):
        torch.library.opcheck(getattr(ops, case.__name__), args, options)
