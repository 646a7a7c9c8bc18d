"""Every op's edges: nothing to compute, a named implementation that cannot run, and input that it refuses."""

import functools
import math

import golfgpt_kernels as gk
import pytest
import torch
from golfgpt_kernels.testing import randn

X, W, W2, T = randn(2, 3, 8), randn(5, 8, seed=1), randn(8, 5, seed=2), torch.tensor([[0, 1, 2], [3, 4, 0]])
OPS = {
    "linear_relu2": (gk.linear_relu2, (X, W)),
    "relu2_mlp": (gk.relu2_mlp, (X, W, W2)),
    "quantize_rows": (functools.partial(gk.quantize_rows, spec=gk.RowQuant(bits=6, clip="quantile")), (W,)),
    "fake_quantize_rows": (functools.partial(gk.fake_quantize_rows, spec=gk.RowQuant(bits=6)), (W,)),
    "fake_quant_linear": (functools.partial(gk.fake_quant_linear, spec=gk.RowQuant(bits=6, group_size=4)), (X, W)),
    "newton_schulz": (gk.newton_schulz, (X,)),
    "softcap_cross_entropy": (functools.partial(gk.softcap_cross_entropy, z_loss=1e-4), (X, W, T)),
    "token_logprobs": (gk.token_logprobs, (X, W, T)),
}
each_op = pytest.mark.parametrize("op, args", OPS.values(), ids=OPS.keys())


def test_nothing_to_compute():
    assert gk.newton_schulz(torch.zeros(0, 4, 5)).shape == (0, 4, 5)
    codes, scale = gk.quantize_rows(torch.zeros(3, 0, 8), gk.RowQuant(bits=4, clip="quantile"))
    assert codes.shape == (3, 0, 8) and scale.shape == (3, 0)
    nothing = torch.zeros(2, 0, 8), W, torch.zeros(2, 0, dtype=torch.int64)
    assert gk.softcap_cross_entropy(*nothing, reduction="sum") == 0
    assert gk.softcap_cross_entropy(*nothing).isnan()  # a mean of nothing, as in torch


@each_op
def test_named_implementation_never_falls_back(op, args, monkeypatch):
    torch.testing.assert_close(op(*args, impl="eager"), op(*args, impl="auto"))
    gluon = ", 'gluon'" if op is gk.relu2_mlp else ""
    with pytest.raises(ValueError, match=f"impl='cuda'; expected 'auto', 'triton'{gluon} or 'eager'"):
        op(*args, impl="cuda")
    doubles = [a.double() if a.is_floating_point() else a for a in args]
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: .*not in torch\.float64; impl='eager' can"):
        op(*doubles, impl="triton")
    monkeypatch.setattr("golfgpt_kernels._dispatch.INTERPRETING", False)
    with pytest.raises(RuntimeError, match=r"no CUDA device|not on CUDA"):
        op(*args, impl="triton")
    monkeypatch.setattr("golfgpt_kernels._dispatch.MISSING", "triton is not installed")
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: triton is not installed"):
        op(*args, impl="triton")


NAN = W.clone()
NAN[2, 3] = math.nan
REFUSED = {
    "integer dtype": (lambda: gk.linear_relu2(X.int(), W), "x has dtype torch.int32; expected"),
    "other device": (lambda: gk.linear_relu2(X, W.to("meta")), "w is on meta"),
    "inner dimension": (lambda: gk.linear_relu2(X, W2), r"x has shape \(2, 3, 8\) and w \(8, 5\)"),
    "down projection": (
        lambda: gk.relu2_mlp(X, W, W),
        r"w_proj has shape \(5, 8\).*expected w_proj \(N, 5\)",
    ),
    "slope": (lambda: gk.relu2_mlp(X, W, W2, negative_slope=-1), "negative_slope=-1; expected"),
    "bits 1": (lambda: gk.RowQuant(bits=1), "RowQuant: bits=1; expected 2 to 8"),
    "bits 9": (lambda: gk.RowQuant(bits=9), "bits=9; expected 2 to 8"),
    "bits 6.0": (lambda: gk.RowQuant(bits=6.0), "bits=6.0; expected 2 to 8"),
    "bits for a spec": (lambda: gk.fake_quant_linear(X, W, 6), "fake_quant_linear: spec=6 for w; expected a RowQuant"),
    "NaN weight": (lambda: gk.fake_quantize_rows(NAN, gk.RowQuant(bits=8)), r"w\[2, 3\] = nan; expected finite"),
    "vector": (
        lambda: gk.quantize_rows(W[0], gk.RowQuant(bits=8)),
        r"w has shape \(8,\); expected \(\.\.\., rows, cols\)",
    ),
    "no columns": (lambda: gk.quantize_rows(W[:, :0], gk.RowQuant(bits=8)), r"shape \(5, 0\)"),
    "integer weight": (lambda: gk.quantize_rows(W.int(), gk.RowQuant(bits=8)), "w has dtype torch.int32"),
    "clip": (lambda: gk.RowQuant(bits=8, clip="mse"), "clip='mse'; expected .*quantile"),
    "code range": (lambda: gk.RowQuant(bits=8, code_range="half"), "code_range='half'; expected"),
    "codes from": (lambda: gk.RowQuant(bits=8, codes_from="scale"), "codes_from='scale'; expected"),
    "scale dtype": (lambda: gk.RowQuant(bits=8, scale_dtype=torch.int8), "scale_dtype=torch.int8; expected"),
    "scale floor": (lambda: gk.RowQuant(bits=8, scale_floor=-1.0), "scale_floor=-1.0; expected 0 to 65504"),
    "group size": (
        lambda: gk.quantize_rows(W, gk.RowQuant(bits=8, group_size=3)),
        "group_size=3; expected .* 8 columns",
    ),
    "group of none": (lambda: gk.RowQuant(bits=8, group_size=0), "group_size=0; expected None or columns"),
    "wide quantile": (
        lambda: gk.quantize_rows(torch.zeros(1, 500_001), gk.RowQuant(bits=8, clip="quantile")),
        "500001 columns; expected up to 500000",
    ),
    "out shape": (
        lambda: gk.fake_quantize_rows(W, gk.RowQuant(bits=8), W2.clone()),
        r"out has shape \(8, 5\); expected",
    ),
    "codes dtype": (lambda: gk.dequantize_rows(W, W[:, 0]), "expected int8 codes"),
    "scale shape": (
        lambda: gk.dequantize_rows(torch.zeros(2, 4, dtype=torch.int8), torch.ones(4)),
        r"float scale of shape \(2,\)",
    ),
    "1-D matrix": (lambda: gk.newton_schulz(W[0]), r"x has shape \(8,\); expected \(\.\.\., M, N\)"),
    "integer matrix": (lambda: gk.newton_schulz(W.long()), "x has dtype torch.int64"),
    "iteration dtype": (lambda: gk.newton_schulz(W, dtype=torch.int32), "dtype=torch.int32; expected"),
    "steps": (lambda: gk.newton_schulz(W, steps=0), "steps=0; expected an integer >= 1"),
    "eps": (lambda: gk.newton_schulz(W, eps=0.0), "eps=0.0; expected"),
    "coefficients": (lambda: gk.newton_schulz(W, coefficients="cubic"), "coefficients='cubic'; expected"),
    "triples": (lambda: gk.newton_schulz(W, coefficients=((1.0, 2.0, 3.0),) * 4), "steps=5 of them"),
    "pair": (lambda: gk.newton_schulz(W, coefficients=(1.0, 2.0)), "one \\(a, b, c\\)"),
    "target": (lambda: gk.softcap_cross_entropy(X, W, T + 1), r"targets\[1, 1\] = 5, outside the vocabulary"),
    "negative target": (lambda: gk.token_logprobs(X, W, T - 1), r"targets\[0, 0\] = -1, .*expected 0 to 4"),
    "target dtype": (lambda: gk.token_logprobs(X, W, T.int()), "targets have dtype torch.int32"),
    "target shape": (lambda: gk.softcap_cross_entropy(X, W, T[0]), r"targets have shape \(3,\)"),
    "mask": (lambda: gk.token_logprobs(X, W, T, mask=T), "mask has shape .* torch.int64; expected"),
    "softcap": (lambda: gk.token_logprobs(X, W, T, softcap=0.0), "softcap=0.0; expected a positive number"),
    "reduction": (lambda: gk.softcap_cross_entropy(X, W, T, reduction="max"), "reduction='max'; expected"),
    "z loss": (lambda: gk.softcap_cross_entropy(X, W, T, z_loss=-1.0), "z_loss=-1.0; expected"),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
