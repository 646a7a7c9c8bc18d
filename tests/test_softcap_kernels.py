"""Scoring and the softcapped loss as kernels, against float64, on a GPU or interpreted."""

from __future__ import annotations

import math
from functools import partial

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels import softcap_logprobs as module
from golfgpt_kernels.softcap_logprobs import softcap_logits_grad, softcap_logprobs, softcap_logprobs_fwd
from golfgpt_kernels.testing import assert_within_budget, gradients, poisoned, randn

# Programs of a GPU hide what overflows to infinity and is not selected; numpy says so.
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings(
        "ignore:overflow encountered", "ignore:invalid value encountered", "ignore:All-NaN slice"
    ),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SOFTCAPS = [30, 5.0, 100.0, None]  # bounded, bounded and saturated, running maximum with and without a cap

# rows, D, V. Tiles are 32 x 128 x 64 when interpreting.
SHAPES = {
    "aligned": (64, 64, 256),
    "one row": (1, 64, 257),
    "wide": (20, 515, 140),
    "rows": (130, 40, 129),
}


def make(shape, dtype, device, scale=1.0, weight_dtype=torch.float32):
    """Inputs whose logits have standard deviation 4 scale, and targets of which two are -100."""
    m, d, v = shape
    inputs = {
        "hidden": randn(m, d, seed=1, dtype=dtype, device=device, scale=scale),
        "head_weight": randn(v, d, seed=2, dtype=weight_dtype, device=device, scale=4 * d**-0.5),
    }
    targets = torch.arange(m, device=device) * 7 % v
    targets[2:4] = -100
    return inputs, targets


def check_against_eager(op, inputs, grad):
    """The kernel's output and gradients within the budget that eager's errors set; weights are rounded to hidden's."""
    with poisoned():
        ours = gradients(partial(op, impl="triton"), inputs, grad)
    eager = gradients(partial(op, impl="eager"), inputs, grad)
    exact = {name: value.to(inputs["hidden"].dtype).double() for name, value in inputs.items()}
    oracle = gradients(partial(op, impl="eager"), exact, grad.double())
    for name in oracle:
        assert_within_budget(ours[name], eager[name], oracle[name], name, independent=len(inputs["hidden"]))
    return ours


def loss_of(targets, **options):
    options = {"reduction": "none"} | options
    return lambda hidden, head_weight, impl: gk.softcap_cross_entropy(
        hidden, head_weight, targets, **options, impl=impl
    )


def logprobs_of(targets, **options):
    return lambda hidden, head_weight, impl: gk.token_logprobs(hidden, head_weight, targets, **options, impl=impl)


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients(shape, dtype, device):
    inputs, targets = make(shape, dtype, device)
    grad = randn(shape[0], seed=3, device=device)
    ours = check_against_eager(loss_of(targets, z_loss=1e-2), inputs, grad)
    in_fp32 = ours["head_weight"]
    assert in_fp32.dtype == torch.float32
    assert dtype == torch.float32 or (in_fp32 != in_fp32.to(dtype).float()).float().mean() > 0.5, "not rounded to dtype"
    for dropped in (targets == -100).nonzero():
        assert not ours["out"][dropped].any() and not ours["hidden"][dropped].any()


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_and_gradients(dtype, softcap, device):
    inputs, targets = make((37, 64, 257), dtype, device, scale=4.0)  # logits of 16, twice the softcap at most
    grad = randn(37, seed=3, device=device)
    ours = check_against_eager(logprobs_of(targets, softcap=softcap, mask=targets >= 0), inputs, grad)
    assert (ours["out"] <= 0).all()


@pytest.mark.parametrize("softcap", [30.0, 100.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(dtype, softcap, device):
    """Logits of ±1e4: a softcap saturates and its gradients vanish; without one the largest logit takes all."""
    inputs, targets = make((33, 64, 150), dtype, device, scale=2500.0)
    check_against_eager(loss_of(targets, softcap=softcap), inputs, randn(33, seed=3, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(65_536, 512, 1024), (9000, 512, 8192), (3000, 768, 50_257)], ids=str)
def test_real_shapes(shape):
    inputs, targets = make(shape, torch.bfloat16, "cuda")
    check_against_eager(loss_of(targets), inputs, randn(shape[0], seed=3, device="cuda"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction, device):
    """A mean's gradient is one number expanded over the rows: stride 0."""
    inputs, targets = make((37, 64, 129), torch.float32, device)
    check_against_eager(loss_of(targets, reduction=reduction, z_loss=1e-3), inputs, torch.ones((), device=device))


class Untied(torch.autograd.Function):
    """The identity, whose gradient is kept instead of passed on."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.kept.append(grad)
        return None, None


def test_the_gradients_of_a_tied_embedding_meet_in_fp32(device, monkeypatch):
    """bf16 activations, fp32 parameters: the gradient is the fp32 sum of the two uses' own."""
    from golfgpt.model import gpt

    config = gpt.ModelConfig(vocab_size=97, num_layers=2, model_dim=48, num_heads=4, num_kv_heads=2, mlp_hidden=80)
    ids, targets = (torch.arange(64, device=device).view(2, 32) * i % 97 for i in (5, 7))

    def gradient(dtype, impl, kept=None):
        def op(hidden, head_weight, *args, **options):
            head = head_weight if kept is None else Untied.apply(head_weight, kept)
            return gk.softcap_cross_entropy(hidden, head, *args, **options, impl=impl)

        monkeypatch.setattr(gpt, "softcap_cross_entropy", op)
        model = gpt.GPT(config).to(device)
        model.loss(ids, targets, dtype=dtype).backward()
        return model.tok_emb.grad

    head = []
    ours, embedding = gradient(torch.bfloat16, "triton"), gradient(torch.bfloat16, "triton", head)
    assert ours.dtype == embedding.dtype == head[0].dtype == torch.float32
    assert embedding.any() and head[0].any()
    assert torch.equal(ours, embedding + head[0].float())
    assert_within_budget(ours, gradient(torch.bfloat16, "eager"), gradient(torch.float64, "eager").double())


@pytest.mark.gpu
def test_no_logits_in_memory():
    """The logits would be 1 GiB in bf16; G is 128 MiB, dh 64, dW's partial sums 16 each."""
    inputs, targets = make((65_536, 512, 8192), torch.bfloat16, "cuda")
    leaves = [value.requires_grad_() for value in inputs.values()]
    for _ in range(2):  # the first compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = gk.softcap_cross_entropy(*leaves, targets, impl="triton")
        forward = torch.cuda.max_memory_allocated() - before
        torch.autograd.grad(loss, leaves)
    assert forward < 64 << 20
    assert torch.cuda.max_memory_allocated() - before < 512 << 20


def test_weights_of_hiddens_dtype_get_gradients_of_it(device):
    inputs, targets = make((33, 64, 129), torch.bfloat16, device, weight_dtype=torch.bfloat16)
    check_against_eager(loss_of(targets), inputs, randn(33, seed=3, device=device))


# ---- the softmax without a maximum


def test_sum_without_maximum(device, monkeypatch):
    """At cap = 30 and V = 8192 lse is within 3e-6 of float64, an ulp of 32, and as close as with a maximum."""
    scale = torch.tensor([0.02, 1.0, 2.0], device=device).repeat_interleave(8).unsqueeze(-1)
    hidden = (randn(24, 64, seed=1, device=device) * scale).bfloat16()
    weight = randn(8192, 64, seed=2, dtype=torch.bfloat16, device=device, scale=0.5)
    u = hidden.double() @ weight.double().T
    oracle = (30 * torch.tanh(u / 30)).logsumexp(-1)

    def error():
        _, lse, _ = softcap_logprobs(hidden, weight, torch.zeros(24, dtype=torch.int64, device=device), 30.0, -100)
        return (lse.double() - oracle).abs().max().item()

    without = error()
    # compiled, ex2 and rcp are off by 2 ulp of their own, and the tensor core's sum truncates
    assert without <= (3e-6 if device == "cpu" else 1e-5)
    monkeypatch.setattr(module, "_MAX_BOUNDED", 0.0)
    assert without <= 2 * error()


@pytest.mark.parametrize("softcap", [30.0, 40.0, 40.1])
@pytest.mark.parametrize("sign", [1, -1])
def test_all_logits_at_the_cap(softcap, sign, device):
    """The ends of the range in which no maximum is needed: every exponential is 1, or exp(-2 cap)."""
    hidden = torch.full((3, 16), 100.0, dtype=torch.bfloat16, device=device)
    weight = torch.full((300, 16), 10.0 * sign, dtype=torch.bfloat16, device=device)
    targets = torch.tensor([0, 150, 299], device=device)
    logprobs = gk.token_logprobs(hidden, weight, targets, softcap=softcap, impl="triton")
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(300), device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities_sum_to_one(dtype, softcap, device):
    inputs, _ = make((2, 16, 150), dtype, device, scale=2.0)
    hidden = inputs["hidden"].unsqueeze(1).expand(2, 150, 16)
    every = torch.arange(150, device=device).expand(2, 150)
    logprobs = gk.token_logprobs(hidden, inputs["head_weight"], every, softcap=softcap, impl="triton")
    torch.testing.assert_close(
        logprobs.double().exp().sum(-1), torch.ones_like(logprobs[:, 0]).double(), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_certain_tokens(softcap, device):
    """No probability above 1 by rounding, where z[target] and lse are equal but for that."""
    hidden = torch.linspace(2, 8, 200, device=device).unsqueeze(-1).expand(200, 16).bfloat16()
    weight = torch.full((70, 16), -1.0, dtype=torch.bfloat16, device=device)
    weight[7] = 1.0
    targets = torch.full((200,), 7, device=device)
    logprobs = gk.token_logprobs(hidden, weight, targets, softcap=softcap, impl="triton")
    assert (logprobs <= 0).all() and (softcap == 5 or (logprobs > -1e-5).all())


# ---- rows that do not count, targets that do not exist, values that are not finite


@pytest.mark.parametrize("softcap", [30.0, 100.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_rows_are_not_looked_at(dtype, softcap, device):
    """Exactly 0 for any target there, with NaN and with exponentials that overflow in their hidden states."""
    inputs, targets = make((40, 16, 130), dtype, device)
    mask = targets % 3 != 0
    targets = torch.where(mask, targets.clamp(min=0), torch.tensor([-100, 2**40, -1, 130], device=device).repeat(10))
    hidden, weight = inputs["hidden"].clone(), inputs["head_weight"]
    hidden[~mask] *= 1000
    leaves = hidden.requires_grad_(), weight.clone().requires_grad_()
    logprobs = gk.token_logprobs(*leaves, targets, mask=mask, softcap=softcap, impl="triton")
    dh, dw = torch.autograd.grad(logprobs.sum(), leaves)
    assert not logprobs[~mask].any() and not dh[~mask].any()
    kept = [t.detach().requires_grad_() for t in (hidden[mask], weight)]
    alone = gk.token_logprobs(*kept, targets[mask], softcap=softcap, impl="triton")
    expected = torch.autograd.grad(alone.sum(), kept)
    torch.testing.assert_close(logprobs[mask], alone)
    torch.testing.assert_close(dh[mask], expected[0])
    torch.testing.assert_close(dw, expected[1])
    nan = hidden.detach().masked_fill(~mask[:, None], math.nan).requires_grad_()
    logprobs = gk.token_logprobs(nan, weight, targets, mask=mask, softcap=softcap, impl="triton")
    assert torch.equal(torch.autograd.grad(logprobs.sum(), nan)[0], dh)


@pytest.mark.parametrize("ignore_index", [0, 1, -7])
def test_ignore_index(ignore_index, device):
    """Also one that is a token."""
    inputs, targets = make((33, 16, 40), torch.float32, device)
    targets = targets.clamp(min=0)
    targets[5:8] = ignore_index
    check_against_eager(
        loss_of(targets, ignore_index=ignore_index, z_loss=0.1), inputs, randn(33, seed=3, device=device)
    )


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_ignored_rows_do_not_count(impl, z_loss, device):
    """Whatever their hidden states hold, and where nothing else is left."""
    inputs, targets = make((5, 16, 40), torch.float32, device)
    op = loss_of(targets, reduction="mean", z_loss=z_loss)
    expected = loss_of(targets[targets >= 0], reduction="mean", z_loss=z_loss)(
        inputs["hidden"][targets >= 0], inputs["head_weight"], impl
    )
    inputs["hidden"][2:4] = math.nan
    torch.testing.assert_close(op(**inputs, impl=impl), expected)
    leaves = [value.nan_to_num().requires_grad_() for value in inputs.values()]
    nothing = loss_of(torch.full_like(targets, -100), reduction="mean", z_loss=z_loss)(*leaves, impl)
    assert nothing.isnan() and not any(grad.any() for grad in torch.autograd.grad(nothing, leaves))


@pytest.mark.parametrize("softcap", [30.0, None])
def test_target_outside_the_vocabulary_is_nan(softcap, device):
    """Where values are not checked beforehand, on a GPU, such a row must not pass as a score."""
    inputs, targets = make((5, 16, 40), torch.bfloat16, device)
    hidden, weight = (t.requires_grad_() for t in inputs.values())
    targets[:] = torch.tensor([0, 40, -1, 2**33, -100])
    logprob, lse, _ = softcap_logprobs(hidden, weight, targets, softcap, -100)
    outside = torch.tensor([False, True, True, True, False], device=device)
    assert torch.equal(logprob.isnan(), outside) and torch.equal(lse.isnan(), outside)
    (dh,) = torch.autograd.grad(logprob.sum(), hidden)
    assert torch.equal(dh.isnan().all(1), outside)


@pytest.mark.parametrize("softcap", [30.0, 100.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nonfinite_logits(dtype, softcap, device):
    """The first 80 columns, more than half a tile, are -inf, +inf or NaN in one row each; the fourth row is finite."""
    hidden = torch.tensor([[-1e30, 0.0], [1e30, 0.0], [math.nan, 0.0], [0.0, 1.0]], dtype=dtype, device=device)
    weight = torch.zeros(140, 2, dtype=dtype, device=device)
    weight[:80, 0] = 1e30
    weight[:, 1] = 1.0
    targets = torch.full((4,), 100, device=device)
    ours, eager = (gk.token_logprobs(hidden, weight, targets, softcap=softcap, impl=i) for i in ("triton", "eager"))
    torch.testing.assert_close(ours, eager, equal_nan=True)
    assert ours[[0, 3]].isfinite().all() and ours[2].isnan()


# ---- chunks, tiles


def test_chunks(device, monkeypatch):
    """Rows of G at a time: another order of dW's sum, and no other difference."""
    inputs, targets = make((300, 24, 65), torch.float32, device)
    grad = randn(300, seed=3, device=device)
    whole = gradients(partial(loss_of(targets), impl="triton"), inputs, grad)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 128 * 65 * 4)
    sizes = []

    def spy(hidden, *args):
        sizes.append(len(hidden))
        return softcap_logits_grad(hidden, *args)

    monkeypatch.setattr(module, "softcap_logits_grad", spy)
    chunked = gradients(partial(loss_of(targets), impl="triton"), inputs, grad)
    assert sizes == [128, 128, 44]
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [(64, 64, 32), (16, 256, 16)], ids=str)
def test_other_tiles(tile, device):
    """Numbers do not depend on the tile beyond rounding, whichever a table holds."""
    tile = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True)) | {"num_warps": 4, "num_stages": 2}
    inputs, targets = make((70, 80, 300), torch.float32, device)
    args = *inputs.values(), targets
    outs = [torch.empty(70, 300, device=device) for _ in range(2)]
    with poisoned():
        results = [softcap_logprobs_fwd(*args, 30.0, -100, t) for t in (tile, None)]
        for out, t in zip(outs, (tile, None), strict=True):
            softcap_logits_grad(*args, *results[1][1:], *results[1][:2], 30.0, -100, out, t)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
