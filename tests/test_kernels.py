"""The ops against independent formulations in float64, and their gradients."""

import functools
import itertools
import math

import golfgpt_kernels as gk
import pytest
import torch
import torch.nn.functional as F
from golfgpt_kernels import softcap_logprobs
from golfgpt_kernels._coefficients import POLAR_EXPRESS_COEFFICIENTS
from golfgpt_kernels._rows import CLIP_QUANTILE
from golfgpt_kernels.testing import assert_within_budget, budget_violation, randn

pytestmark = pytest.mark.numeric

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
F64 = torch.float64


# ---- relu² MLP


def mlp_by_hand(x, w_fc, w_proj, slope):
    z = x @ w_fc.T
    return torch.where(z > 0, z**2, (slope * z) ** 2) @ w_proj.T


SHAPES = {
    "aligned": (64, 32, 128),
    "ragged": (37, 19, 515),
    "one row": (1, 7, 3),
    "bank of batches": ((2, 3), 8, 16),
}


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_relu2_mlp_forward(shape, dtype, slope):
    rows, k, hidden = shape
    rows = rows if isinstance(rows, tuple) else (rows,)
    args = (
        randn(*rows, k, dtype=dtype),
        randn(hidden, k, seed=1, dtype=dtype),
        randn(k, hidden, seed=2, dtype=dtype),
    )
    oracle = mlp_by_hand(*(a.to(F64) for a in args), slope)
    actual = gk.relu2_mlp(*args, negative_slope=slope)
    assert actual.dtype == dtype
    rival = mlp_by_hand(*args, slope)
    assert_within_budget(actual, rival, oracle)
    assert budget_violation(actual * 1.05, rival, oracle)  # the budget has teeth
    up = gk.linear_relu2(*args[:2], negative_slope=slope)
    assert torch.equal(F.linear(up, args[2]), actual)  # the same operations


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_relu2_mlp_gradients(slope):
    args = [randn(4, 3, dtype=F64), randn(5, 3, seed=1, dtype=F64), randn(2, 5, seed=2, dtype=F64)]
    for needs in itertools.product([False, True], repeat=3):
        if any(needs):
            inputs = [a.clone().requires_grad_(n) for a, n in zip(args, needs, strict=True)]
            assert torch.autograd.gradcheck(lambda *a: gk.relu2_mlp(*a, negative_slope=slope), inputs)
    assert torch.autograd.gradcheck(gk.linear_relu2, [a.requires_grad_() for a in args[:2]])


def test_weights_are_rounded_to_the_activations_dtype():
    x, w = randn(4, 8, dtype=torch.bfloat16), randn(5, 8, seed=1)
    assert torch.equal(gk.linear_relu2(x, w), gk.linear_relu2(x, w.bfloat16()))


# ---- quantizer


def quantize_by_hand(w, bits, low):
    """One weight at a time in Python floats, which are float64; no floor, scale of a row as it is."""
    qmax = 2 ** (bits - 1) - 1
    scale = [max(abs(v) for v in row) / qmax for row in w.tolist()]
    codes = [[max(low, min(qmax, round(v / s))) for v in row] for row, s in zip(w.tolist(), scale, strict=True)]
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(scale, dtype=F64)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("code_range", ["symmetric", "full"])
def test_codes_and_range(bits, code_range):
    w = randn(33, 65, dtype=F64)
    qmax = 2 ** (bits - 1) - 1
    low = -qmax - (code_range == "full")
    codes, scale = gk.quantize_rows(w, gk.RowQuant(bits=bits, code_range=code_range, scale_dtype=F64))
    expected = quantize_by_hand(w, bits, low)
    assert torch.equal(codes, expected[0])
    torch.testing.assert_close(scale, expected[1], rtol=1e-15, atol=0)
    assert codes.abs().max() == qmax  # the row maximum is the last code of both ranges
    in_fp32, _ = gk.quantize_rows(w.float(), gk.RowQuant(bits=bits, code_range=code_range, scale_dtype=torch.float32))
    assert (in_fp32 != codes).float().mean() <= 0.002  # ties and near-ties


def quantile_clip(w):
    spec = gk.RowQuant(bits=2, clip="quantile", scale_dtype=torch.float32)  # qmax = 1: scale = c
    return gk.quantize_rows(w, spec)[1]


def assert_is_torch_quantile(w):
    scale = quantile_clip(w)
    expected = torch.quantile(w.abs(), CLIP_QUANTILE, dim=-1)
    if TORCH <= (2, 13):
        assert torch.equal(scale, expected)
    else:  # it rounds the rank elsewhere; the quantizer stays with what the published exports were made with
        cols, eps = w.shape[-1], torch.finfo(torch.float32).eps
        first, second = w.abs().topk(min(2, cols), dim=-1).values[:, [0, -1]].T
        assert ((scale - expected).abs() <= 4 * cols * eps * (first - second) + 2 * eps * first).all()


@pytest.mark.parametrize("cols", [1, 2, 3, 4, 101, 255, 256, 257, 512, 777, 1024, 1536, 2999, 4096, 65_537, 500_000])
@pytest.mark.parametrize("magnitude", [1e-6, 0.02, 1e3])
def test_quantile_is_torch_quantile(cols, magnitude):
    for seed in range(1 if cols > 4096 else 3):
        assert_is_torch_quantile(randn(3 if cols > 4096 else 17, cols, seed=cols + seed, scale=magnitude))


def test_int8_export_as_published():
    """Per-row int8: quantile clip, floor 1/127, codes from the fp32 scale, fp16 stored."""
    w = torch.cat([randn(40, 300), randn(40, 300, seed=1, scale=100), torch.zeros(1, 300)])
    c = quantile_clip(w)  # torch.quantile's up to torch 2.13, see above
    scale = (c / 127.0).clamp_min(1.0 / 127.0)
    codes = torch.clamp(torch.round(torch.clamp(w, -c[:, None], c[:, None]) / scale[:, None]), -127, 127)
    actual = gk.quantize_rows(w, gk.RowQuant(bits=8, clip="quantile", scale_floor=1 / 127, codes_from="float32_scale"))
    assert torch.equal(actual[0], codes.to(torch.int8))
    assert torch.equal(actual[1], scale.half())


def test_ties_round_half_to_even():
    w = torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 31.0]])
    codes, scale = gk.quantize_rows(w, gk.RowQuant(bits=6))
    assert scale.item() == 1.0
    assert codes.tolist() == [[0, 2, 2, 4, 0, -2, -2, 31]]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clip", ["max", "quantile"])
def test_zero_rows(clip, scale_dtype):
    codes, scale = gk.quantize_rows(torch.zeros(3, 16), gk.RowQuant(bits=8, clip=clip, scale_dtype=scale_dtype))
    assert not codes.any()
    assert (scale > 0).all() and scale.isfinite().all()
    assert not gk.dequantize_rows(codes, scale).any()


def test_single_outlier_row():
    w = torch.zeros(1, 512)
    w[0, 7] = -3.0
    for clip, expected in (("max", -3.0), ("quantile", -3.0 * 0.99917603)):  # the rank's fp32 fraction
        decoded = gk.fake_quantize_rows(w, gk.RowQuant(bits=8, clip=clip, scale_dtype=torch.float32))
        assert decoded[0, 7].item() == pytest.approx(expected, rel=1e-6)
        assert decoded.count_nonzero() == 1


@pytest.mark.parametrize("magnitude, tolerance", [(1e-6, 0.05), (1e-4, 0.01), (1e-2, 0.005), (1e3, 0.005)])
@pytest.mark.parametrize("codes_from", ["stored_scale", "float32_scale"])
def test_tiny_and_large_rows_survive_fp16_scales(magnitude, tolerance, codes_from):
    w = torch.linspace(-magnitude, magnitude, 101).repeat(4, 1)
    codes, scale = gk.quantize_rows(w, gk.RowQuant(bits=8, codes_from=codes_from))
    decoded = gk.dequantize_rows(codes, scale)
    assert scale.dtype == torch.float16
    assert (decoded - w).abs().max() <= tolerance * magnitude


@pytest.mark.parametrize("code_range, low", [("symmetric", -1), ("full", -2)])
def test_fp16_scale_saturates(code_range, low):
    codes, scale = gk.quantize_rows(torch.tensor([[1e6, -1e6, 2e4]]), gk.RowQuant(bits=2, code_range=code_range))
    assert scale.item() == 65504
    assert codes.tolist() == [[1, low, 0]]


def test_group_size():
    w = randn(2, 3, 24)
    codes, scale = gk.quantize_rows(w, gk.RowQuant(bits=4, group_size=8))
    assert codes.shape == w.shape and scale.shape == (2, 3, 3)
    by_hand = gk.quantize_rows(w.reshape(2, 9, 8), gk.RowQuant(bits=4))
    assert torch.equal(codes.reshape(2, 9, 8), by_hand[0])
    assert torch.equal(scale.reshape(2, 9), by_hand[1])
    decoded = gk.dequantize_rows(codes, scale, group_size=8)
    assert torch.equal(decoded, gk.dequantize_rows(*by_hand).reshape(2, 3, 24))
    assert torch.equal(decoded, gk.fake_quantize_rows(w, gk.RowQuant(bits=4, group_size=8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_trained_is_what_is_decoded(dtype):
    """fake_quantize_rows, with `out` or without, and the weight inside fake_quant_linear equal decoded codes."""
    w = randn(2, 30, 40)
    decoded = gk.dequantize_rows(*gk.quantize_rows(w, gk.RowQuant(bits=6)), dtype=dtype)
    assert torch.equal(gk.fake_quantize_rows(w, gk.RowQuant(bits=6)).to(dtype), decoded)
    out = torch.full_like(decoded, math.nan)
    assert gk.fake_quantize_rows(w, gk.RowQuant(bits=6), out) is out
    assert torch.equal(out, decoded)
    eye = torch.eye(40, dtype=dtype)
    assert torch.equal(gk.fake_quant_linear(eye, w[0], gk.RowQuant(bits=6)), decoded[0].T)


def test_straight_through_gradient():
    w = randn(5, 8, dtype=F64)
    x = randn(3, 4, 8, seed=1, dtype=F64)
    grad = randn(3, 4, 5, seed=2, dtype=F64)
    for needs_x, needs_w in ((True, True), (True, False), (False, True)):
        x_, w_ = x.clone().requires_grad_(needs_x), w.clone().requires_grad_(needs_w)
        gk.fake_quant_linear(x_, w_, gk.RowQuant(bits=3, clip="quantile")).backward(grad)
        if needs_w:
            torch.testing.assert_close(w_.grad, torch.einsum("btn,btk->nk", grad, x))
        if needs_x:
            w_hat = gk.fake_quantize_rows(w, gk.RowQuant(bits=3, clip="quantile"))
            torch.testing.assert_close(x_.grad, grad @ w_hat)
    assert torch.autograd.gradcheck(lambda a: gk.fake_quant_linear(a, w, gk.RowQuant(bits=4)), x.requires_grad_())
    bank = randn(2, 3, 4).requires_grad_()
    gk.fake_quantize_rows(bank, gk.RowQuant(bits=4)).backward(torch.full((2, 3, 4), 0.25))
    assert torch.equal(bank.grad, torch.full((2, 3, 4), 0.25))


def test_master_gradient_has_the_master_dtype():
    w = randn(5, 8).requires_grad_()
    gk.fake_quant_linear(randn(3, 8, dtype=torch.bfloat16), w, gk.RowQuant(bits=6)).float().sum().backward()
    assert w.grad.dtype == torch.float32


W = randn(5, 8)
COMPILED = {
    "quantize_rows": (gk.quantize_rows, (W, gk.RowQuant(bits=6, clip="quantile"))),
    "fake_quantize_rows": (gk.fake_quantize_rows, (W, gk.RowQuant(bits=6))),
    "fake_quant_linear": (gk.fake_quant_linear, (randn(3, 8, seed=1), W, gk.RowQuant(bits=6, group_size=4))),
}


@pytest.mark.parametrize("op, args", COMPILED.values(), ids=COMPILED.keys())
def test_compiled_quantizer_is_opaque(op, args):
    """Inductor would drop the scale's round trip through fp16: codes then differ from the exported ones."""
    torch.compiler.reset()
    code = []
    torch.compile(op, fullgraph=True, backend=lambda graph, _: code.append(graph.code) or graph)(*args)
    assert "golfgpt_kernels.quantize_rows" in code[0] or "golfgpt_kernels.fake_quantize_" in code[0]
    assert "round" not in code[0]


def test_compute_copy_write_compiles():
    torch.compiler.reset()
    out = torch.empty(5, 8, dtype=torch.bfloat16)
    compiled = torch.compile(gk.fake_quantize_rows, fullgraph=True, backend="aot_eager")
    for spec in (gk.RowQuant(bits=6), gk.RowQuant(bits=5, clip="quantile", scale_floor=1 / 31)):
        compiled(W, spec, out)
        assert torch.equal(out, gk.fake_quantize_rows(W, spec).bfloat16())


# ---- Newton-Schulz


def svd_map(x, triples):
    """The same polynomials applied to the singular values: what the iteration computes, exactly."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / torch.linalg.vector_norm(x, dim=(-2, -1)).unsqueeze(-1)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return u * s.unsqueeze(-2) @ vh


QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
MATRICES = {"square": (32, 32), "wide": (24, 70), "tall": (70, 24), "bank": (3, 16, 40), "one row": (1, 9)}


@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize(
    "coefficients, triples", [("quintic", QUINTIC), ("polar_express", POLAR_EXPRESS_COEFFICIENTS[:5])]
)
def test_newton_schulz_is_a_map_of_singular_values(shape, coefficients, triples):
    x = randn(*shape, dtype=F64)
    oracle = svd_map(x, triples)
    exact = functools.partial(gk.newton_schulz, x, dtype=F64, eps=1e-30)
    actual = exact(coefficients=coefficients)
    torch.testing.assert_close(actual, oracle, rtol=0, atol=1e-9)
    assert torch.equal(exact(coefficients=tuple(triples)), actual)
    in_bf16 = gk.newton_schulz(x.float(), coefficients=coefficients)
    assert in_bf16.dtype == torch.float32
    assert torch.equal(in_bf16, in_bf16.bfloat16().float())
    assert (in_bf16 - oracle).norm() <= 0.1 * oracle.norm()  # 0.083 at worst


def test_polar_express_converges_to_one():
    x = randn(40, 64, dtype=F64)
    for steps, tolerance in ((8, 1e-3), (10, 1e-9)):
        s = torch.linalg.svdvals(gk.newton_schulz(x, steps=steps, coefficients="polar_express", dtype=F64))
        assert (s - 1).abs().max() <= tolerance


def test_newton_schulz_scale_transpose_and_batch():
    x = randn(3, 20, 30)
    y = gk.newton_schulz(x)
    assert torch.equal(gk.newton_schulz(x * 2.0**10), y)  # the exponent drops out; the norm is far above eps
    assert torch.equal(gk.newton_schulz(x.mT), y.mT)  # a tall matrix is iterated as its transpose, which is x
    for one, of_batch in zip(x, y, strict=True):
        assert (gk.newton_schulz(one) - of_batch).abs().max() <= 0.02


def test_newton_schulz_gradient():
    for shape in ((3, 4), (2, 4, 3)):
        x = randn(*shape, dtype=F64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: gk.newton_schulz(x, steps=2, dtype=F64), x)


# ---- softcapped cross entropy and token log probabilities


def nll_by_hand(hidden, head, targets, softcap):
    z = hidden @ head.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)
    return -torch.log(p[torch.arange(len(targets)), targets])


@pytest.mark.parametrize("softcap", [30.0, 5.0, None])
@pytest.mark.parametrize("shape", [(64, 32, 128), (37, 19, 515), (1, 7, 3)], ids=["aligned", "ragged", "one row"])
def test_loss_and_logprobs_forward(shape, softcap):
    rows, dim, vocab = shape
    hidden, head = randn(rows, dim), randn(vocab, dim, seed=1)
    targets = torch.arange(rows) * 7 % vocab
    oracle = nll_by_hand(hidden.to(F64), head.to(F64), targets, softcap)
    rival = nll_by_hand(hidden, head, targets, softcap)
    nll = gk.softcap_cross_entropy(hidden, head, targets, softcap=softcap, reduction="none")
    logprobs = gk.token_logprobs(hidden, head, targets, softcap=softcap)
    assert nll.dtype == logprobs.dtype == torch.float32
    # A loss is rounded as its two parts are, log-sum-exp and the target's logit: in one row it is far smaller.
    z = (hidden.to(F64) * head.to(F64)[targets]).sum(1)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    for result in (nll, -logprobs):
        assert_within_budget(result + z.float(), rival + z.float(), oracle + z)
    assert budget_violation(nll * 1.01 + z.float(), rival + z.float(), oracle + z)
    mean = gk.softcap_cross_entropy(hidden, head, targets, softcap=softcap)
    total = gk.softcap_cross_entropy(hidden, head, targets, softcap=softcap, reduction="sum")
    torch.testing.assert_close(torch.stack([mean, total]), torch.stack([oracle.mean(), oracle.sum()]).float())


def test_bf16_logits_are_rounded_once():
    hidden, head = randn(20, 32, dtype=torch.bfloat16), randn(50, 32, seed=1)
    targets = torch.arange(20)
    z = 30 * torch.tanh((hidden @ head.bfloat16().T).float() / 30)
    expected = F.cross_entropy(z, targets, reduction="none")
    for nll in (
        gk.softcap_cross_entropy(hidden, head, targets, reduction="none"),
        -gk.token_logprobs(hidden, head, targets),
    ):
        assert nll.dtype == torch.float32
        torch.testing.assert_close(nll, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [3.0, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_gradients(reduction, softcap, z_loss):
    hidden = randn(2, 3, 4, dtype=F64).requires_grad_()
    head = randn(7, 4, seed=1, dtype=F64).requires_grad_()
    targets = torch.tensor([[0, 6, -100], [3, 3, 1]])
    options = dict(softcap=softcap, reduction=reduction, z_loss=z_loss)
    loss = functools.partial(gk.softcap_cross_entropy, **options)
    assert torch.autograd.gradcheck(lambda h, w: loss(h, w, targets), (hidden, head), fast_mode=True)


def test_ignored_and_masked_tokens():
    hidden, head = randn(2, 3, 4), randn(7, 4, seed=1)
    targets = torch.tensor([[0, 6, -1], [3, 99, 1]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    kept = gk.token_logprobs(hidden[mask], head, targets[mask])
    logprobs = gk.token_logprobs(hidden, head, targets, mask=mask)
    torch.testing.assert_close(logprobs[mask], kept)
    assert not logprobs[~mask].any()
    ignored = targets.masked_fill(~mask, -7)
    options = dict(ignore_index=-7)
    none = gk.softcap_cross_entropy(hidden, head, ignored, reduction="none", **options)
    torch.testing.assert_close(none, -logprobs)
    torch.testing.assert_close(gk.softcap_cross_entropy(hidden, head, ignored, **options), -kept.mean())
    assert not gk.token_logprobs(hidden, head, targets, mask=torch.zeros_like(mask)).any()


def test_z_loss():
    hidden, head, targets = randn(6, 4), randn(7, 4, seed=1), torch.arange(6)
    plain, penalized = (gk.softcap_cross_entropy(hidden, head, targets, reduction="none", z_loss=z) for z in (0, 1e-2))
    z = 30 * torch.tanh(hidden @ head.T / 30)
    torch.testing.assert_close(penalized - plain, 1e-2 * z.exp().sum(-1).log() ** 2)


def test_logprob_gradient_and_normalization():
    hidden = randn(5, 4, dtype=F64).requires_grad_()
    head = randn(7, 4, seed=1, dtype=F64).requires_grad_()
    targets, mask = torch.arange(5), torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda h, w: gk.token_logprobs(h, w, targets, mask=mask), (hidden, head))
    every = torch.arange(7).repeat(5, 1)
    p = gk.token_logprobs(hidden.unsqueeze(1).expand(5, 7, 4), head, every).exp().sum(-1)
    torch.testing.assert_close(p, torch.ones(5, dtype=F64))


def test_logprob_chunks(monkeypatch):
    hidden, head, targets = randn(11, 4), randn(7, 4, seed=1), torch.arange(11) % 7
    whole = gk.token_logprobs(hidden, head, targets)
    sizes = []

    def spy(hidden, *args, **kwargs):
        sizes.append(len(hidden))
        return reference(hidden, *args, **kwargs)

    reference = softcap_logprobs.token_logprobs_ref
    monkeypatch.setattr(softcap_logprobs, "token_logprobs_ref", spy)
    monkeypatch.setattr(softcap_logprobs, "_CHUNK_LOGITS", 7 * 4)
    torch.testing.assert_close(gk.token_logprobs(hidden, head, targets), whole)
    assert sizes == [4, 4, 3]
