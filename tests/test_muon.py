"""The Muon step: its kernels, its optimizer, and the same update however many ranks there are."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels import muon as kernels
from golfgpt_kernels.testing import poisoned, randn

from golfgpt.config import ModelConfig, OptimConfig
from golfgpt.distributed import Ranks
from golfgpt.flat import FlatGradients
from golfgpt.model import GPT, MATRIX_BANKS
from golfgpt.optim import Muon, Optimizers

SHAPES = [(2, 24, 40), (3, 40, 24), (0, 8, 8), (24, 40), (5, 1, 7)]
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
    gk.muon_momentum_(grads, buffers, [g.bfloat16() for g in grads], scalar(0.9, device), impl="triton")
    gk.muon_update_(buffers, grads, scalar(0.1, device), scales=[1.0] * 5, impl="triton")
    assert len(launches) == 2


def test_opcheck(device):
    grads, buffers, outs = tensors(0, device=device), tensors(10, device=device), tensors(20, device=device)
    ok = torch.tensor(True, device=device)
    torch.library.opcheck(torch.ops.golfgpt.muon_momentum_, (grads, buffers, outs, scalar(0.9, device), True, ok))
    shadows = [t.bfloat16() for t in outs]
    torch.library.opcheck(
        torch.ops.golfgpt.muon_update_, (buffers, grads, scalar(0.9, device), [1.0] * 5, 0.1, shadows, None)
    )


G = [randn(3, 4)]
REFUSED = {
    "shapes": (lambda: gk.muon_momentum_(G, [randn(4, 3)], G, scalar(0.9, "cpu")), r"buffers \[\(4, 3\)\]; possible"),
    "dtypes": (lambda: gk.muon_momentum_(G * 2, [G[0], G[0].half()], G * 2, scalar(0.9, "cpu")), "buffers have dtypes"),
    "integers": (lambda: gk.muon_update_(G, [G[0].int()], scalar(0.9, "cpu"), scales=[1.0]), "dtype torch.int32"),
    "scalar": (lambda: gk.muon_momentum_(G, G, G, torch.ones(1)), r"momentum has dtype torch.float32, shape \(1,\)"),
    "guard": (
        lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[1.0], ok=torch.ones(())),
        "ok has dtype torch.float32",
    ),
    "scales": (lambda: gk.muon_update_(G, G, scalar(0.1, "cpu"), scales=[]), "0 scales for 1 params"),
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
def test_shadows_follow(impl, device):
    params = parameters(device)
    shadows = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in params}
    run(params, shadows=shadows, impl=impl)
    assert all(torch.equal(shadows[p], p.bfloat16()) for p in params)


def test_nonfinite_gradient_is_refused():
    params = parameters()
    optimizer = run(params)
    before = [p.detach().clone() for p in params] + [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    params[1].grad[0, 3, 5] = float("inf")
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
    flat = FlatGradients(model, MATRIX_BANKS, alone, sharded=False, control=0)
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
if ranks.main:
    torch.save(result, {out!r})
ranks.close()
"""


def train_on(ranks, sharded):
    """Weights after steps 1 and 20 and the state, of given gradients of which each rank holds a part."""
    model = GPT(SMALL)
    flat = FlatGradients(model, MATRIX_BANKS, ranks, sharded=sharded, control=2)
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
    flat = FlatGradients(resumed, MATRIX_BANKS, ranks, sharded=sharded, control=2)
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
    flat = FlatGradients(model, MATRIX_BANKS, Ranks(1, 3, torch.device("cpu")), sharded=True, control=1)
    for stack in flat.stacks:
        real = sum(stack.counts)
        assert len(stack.gradients) % 3 == 0 and len(stack.shard) * 3 == len(stack.gradients)
        assert not stack.weights[real:].any()
        banks = {name: dict(model.named_parameters())[name] for name in stack.names}
        torch.testing.assert_close(flat.scatter(stack, banks), stack.shard.detach())
