"""Muon: the optimizer, and the same update on any number of ranks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from golfgpt_kernels import RowQuant
from golfgpt_kernels import muon as kernels
from golfgpt_kernels.fake_quant import fake_quantize_rows_ref
from golfgpt_kernels.testing import randn

from golfgpt.config import BigramConfig, ModelConfig, OptimConfig, ValueEmbeddingConfig
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.optim.flat import FlatGradients
from golfgpt.optim.optimizers import Muon, Optimizers, by_muon

pytestmark = pytest.mark.numeric

INT6 = RowQuant(bits=6)
SMALL = ModelConfig(vocab_size=64, num_layers=3, model_dim=24, num_heads=3, num_kv_heads=1, mlp_hidden=40)


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
    """Momentum, update, and a normalization of each of two shapes, with the norm's own launch where rows were divided
    since the momentum. One shape is the other's transpose: they share the three launches of a Newton-Schulz step, but
    for the last, which writes where each came from."""
    counted = []
    for module in (kernels, sys.modules["golfgpt_kernels.newton_schulz"]):
        launch = module.launch
        counting = lambda *args, launch=launch, **options: counted.append(launch(*args, **options))  # noqa: E731
        monkeypatch.setattr(module, "launch", counting)
    run(parameters(device), steps=1, impl="triton", row_norm=row_norm, ns_steps=2)
    assert len(counted) == 2 + 2 * (1 + row_norm) + 3 * 2 + 1


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
@pytest.mark.parametrize("world, sharded", [(2, True), (3, False), (3, True)])
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


def test_a_decay_on_the_device_is_the_same_decay():
    """As it tapers; and nothing decays in a step that is not ok."""
    w, g = randn(6, 8), randn(6, 8, seed=1)
    ends = []
    for decay in (0.3, torch.tensor(0.3)):
        p = torch.nn.Parameter(w.clone())
        p.grad = g
        Muon([p], lr=0.1, weight_decay=decay, dtype=torch.float32).step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)
    p = torch.nn.Parameter(w.clone())
    p.grad = g
    Muon([p], lr=0.1, weight_decay=torch.tensor(0.3)).step(ok=torch.tensor(False))
    assert torch.equal(p.detach(), w)


@pytest.mark.parametrize("sharded", [False, True])
def test_projections_by_adam_as_published(sharded):
    values = ValueEmbeddingConfig(dim=8, layers=(1,))
    model = GPT(replace(SMALL, bigram=BigramConfig(rows=20, dim=8), value_embedding=values))
    config = OptimConfig(projections="adam", weight_decay=0.5, scalar_weight_decay=0.25)
    flat = FlatGradients(
        model, Ranks(0, 2, torch.device("cpu")), sharded=sharded, control=0, matrices=by_muon(model.table, config)
    )
    optimizers = Optimizers(model, config, flat)
    control = next(group for group in optimizers.adam.param_groups if group["weight_decay"] == 0.25)
    members = {id(p) for p in control["params"]}
    assert {id(model.bigram_proj), id(model.value_proj), id(model.q_gain)} <= members
    assert not {"bigram_proj", "value_proj"} & {name for stack in flat.stacks for name in stack.names}
    assert set(by_muon(model.table, OptimConfig())) - set(by_muon(model.table, config)) == {"bigram_proj", "value_proj"}
