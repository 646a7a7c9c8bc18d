"""What records add to GPTQ: wide columns, corrections of low rank, clips that are searched."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from golfgpt_kernels import RowQuant, quantize_rows
from models import SMALL, lively

from golfgpt.config import LoopConfig, QuantConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.published import quantizers
from golfgpt.quant import artifact, calibration
from golfgpt.quant.formats import TensorFormat, decode
from golfgpt.quant.quantizer import Quantizer

pytestmark = pytest.mark.numeric
CPU = Ranks(0, 1, torch.device("cpu"))
GPTQ = QuantConfig(
    bits=4, rules=("tok_emb.weight=int5",), clip="deviation", deviations=4.0, keep_numel=0, method="gptq"
)
MODEL = replace(SMALL, loop=LoopConfig(first=1, last=2, passes=3))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in lively(MODEL).named_parameters()}


@pytest.fixture(scope="module")
def hessians(state) -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (4, 40), generator=torch.Generator().manual_seed(1))
    return calibration.hessians(lively(MODEL), [(ids, None)], Quantizer(MODEL, GPTQ), CPU, torch.float32)


def shipped(encoded, quant) -> dict[str, torch.Tensor]:
    """Weights read back from an artifact, which must be those of `encoded`."""
    blob = artifact.seal(encoded, model=MODEL, quant=quant, tokenizer_sha256="0" * 64, seq_len=8)
    got = artifact.unpack(blob)
    assert got.info.formats == {name: tensor.format for name, tensor in encoded.items()}
    expected = decode(encoded)
    assert all(torch.equal(got.state[name], w) for name, w in expected.items())
    return expected


def lost(state, decoded, hessians, name) -> torch.Tensor:
    error = (decoded[name] - state[name]).double()
    error = error if error.ndim == 3 else error[None]
    return torch.einsum("nrc,ncd,nrd->n", error, hessians[name].double(), error)


def test_wide_columns_are_those_of_one_matrix_and_lessen_its_error(state, hessians):
    quant = replace(GPTQ, wide_columns=16)
    plain, wide = (Quantizer(MODEL, q).encode(state, hessians) for q in (GPTQ, quant))
    (name,) = [name for name, tensor in wide.items() if tensor.format.wide is not None]
    bank, layer = re.fullmatch(r"(\w+)(?:\[(\d+):\d+\])?", name).groups()
    columns = slice(wide[name].format.wide, wide[name].format.wide + 16)
    assert wide[name].values[..., columns].abs().max() > 2 ** wide[name].format.bits
    before, after = decode(plain), shipped(wide, quant)
    same = [torch.equal(before[other], after[other]) for other in before]
    assert same.count(False) == 1 and not torch.equal(before[bank], after[bank])
    layer = int(layer or 0)
    assert lost(state, after, hessians, bank)[layer] < 0.9 * lost(state, before, hessians, bank)[layer]
    # Magnitude of inputs times weights, by hand; looped layers count per pass.
    best, passes = {}, [1, 3, 3, 1, 1]
    for other, h in hessians.items():
        for i, matrix in enumerate(state[other] if state[other].ndim == 3 else [state[other]]):
            rms = (h[i].diagonal() / (passes[i] if state[other].ndim == 3 else 1)).sqrt()
            scores = (rms * matrix.abs().mean(0)).unfold(0, 16, 16).sum(1)
            best[other, i] = float(scores.max()), int(scores.argmax()) * 16
    assert max(best, key=best.get) == (bank, layer) and best[bank, layer][1] == columns.start


@pytest.mark.parametrize("group", [16, 0, 7], ids=["asymmetric", "symmetric", "does not divide"])
@pytest.mark.parametrize("wide", [0, 16])
def test_corrections_go_to_the_largest_errors_and_lessen_them(state, hessians, group, wide):
    quant = replace(GPTQ, low_rank=4, low_rank_tensors=2, low_rank_group=group, wide_columns=wide)
    plain = decode(Quantizer(MODEL, replace(quant, low_rank=0)).encode(state, hessians))
    encoded = Quantizer(MODEL, quant).encode(state, hessians)
    chosen = {name: tensor.format for name, tensor in encoded.items() if tensor.format.rank is not None}
    assert [format.rank_group for format in chosen.values()] == [16 if group == 16 else None] * 2
    after, norms = shipped(encoded, quant), {}
    for name, w in state.items():
        if name in hessians:
            errors = [
                (x - w).view(-1, *w.shape[-2:]).flatten(1).norm(dim=1).tolist() for x in (plain[name], after[name])
            ]
            norms |= {(name, i): pair for i, pair in enumerate(zip(*errors, strict=True))}
    largest = sorted(norms, key=lambda key: -norms[key][0])[:2]
    for key, (before, now) in norms.items():
        assert (now < before) if key in largest else now == before, key


def test_formats_that_no_tensor_has():
    for fields in ({"wide": 3}, {"wide": 3, "wide_columns": 6}, {"wide": 0, "wide_columns": 4, "group": 4}):
        with pytest.raises(InputError, match="wide columns from"):
            TensorFormat((4, 8), "int4", "float16", **fields)
    with pytest.raises(InputError, match="a correction of rank 5"):
        TensorFormat((4, 8), "int4", "float16", rank=5)
    for fields in ({"rank_group": 4}, {"rank": 2, "rank_group": 5}):
        with pytest.raises(InputError, match=r"groups of \d codes"):
            TensorFormat((4, 8), "int4", "float16", **fields)
    for value in (-1, True, 1.0, "1"):
        with pytest.raises(InputError, match="expected an integer"):
            TensorFormat((4, 8), "int4", "float16", rank=value)
    with pytest.raises(InputError, match="has no scales"):
        TensorFormat((4, 8), "float16", rank=1)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_searched_clip_has_no_more_error_than_each_rows_maximum(state, hessians, method):
    """Also where only some tensors have it, and on any number of ranks."""
    quant = QuantConfig(bits=4, clip="search", keep_numel=0, method=method, rules=("*.c_v.*=int8@max",))
    widest = replace(quant, clip="max")
    known = hessians if method == "gptq" else None
    by_search, by_max = (Quantizer(MODEL, q).encode(state, known) for q in (quant, widest))
    assert torch.equal(by_search["c_v"].values, by_max["c_v"].values)
    for name in ("c_q", "mlp_fc", "tok_emb"):
        errors = [(decode({name: x[name]})[name] - state[name]).square().mean() for x in (by_search, by_max)]
        assert errors[0] <= errors[1], name
    assert any(not torch.equal(by_search[n].scale, by_max[n].scale) for n in ("c_q", "mlp_fc", "tok_emb"))
    shipped(by_search, quant)


@pytest.mark.parametrize("quant", [GPTQ, replace(GPTQ, clip="search", deviations=0.0), replace(GPTQ, low_rank=2)])
def test_ranks_share_the_solution_and_get_the_same_codes(state, hessians, quant):
    """Three ranks, one after another: a sum over ranks is a sum of what they have."""
    alone = Quantizer(MODEL, quant).encode(state, hessians)
    quantizer = Quantizer(MODEL, quant)
    weights = quantizer.weights(state)
    parts = [quantizer._solved(weights, hessians, Ranks(rank, 3, CPU.device), lambda text: None) for rank in range(3)]
    for name, (codes, scale) in parts[0].items():
        whole = [codes + parts[1][name][0] + parts[2][name][0], scale + parts[1][name][1] + parts[2][name][1]]
        if name in alone:
            assert torch.equal(whole[0], alone[name].values) and torch.equal(whole[1], alone[name].scale)
    assert all(any(part[name][0].any() for name in part) for part in parts), "each rank has something to do"


def test_scales_that_know_inputs_differ_by_row(state, hessians):
    plain, aware = (Quantizer(MODEL, replace(GPTQ, hessian_clip=x)).encode(state, hessians) for x in (0.0, 0.5))
    ratio = aware["mlp_fc"].scale.float() / plain["mlp_fc"].scale.float()
    assert ratio.std() > 0.01 and abs(float(ratio.mean()) - 1) < 0.1


def test_what_excludes_each_other():
    for fields in ({"wide_columns": 16}, {"hessian_clip": 0.2}):
        with pytest.raises(ValueError, match=r"expected quant\.method gptq"):
            QuantConfig(**fields)
    with pytest.raises(ValueError, match=r"quant\.hessian_clip 0\.2 expected a clip by deviation"):
        QuantConfig(hessian_clip=0.2, method="gptq")
    for fields in ({"low_rank": 2}, {"clip": "search"}, {"rules": ("*.c_q.*=int4@search",)}):
        with pytest.raises(ValueError, match=r"quant\.qat is export; expected off"):
            QuantConfig(qat="export", **fields)
    with pytest.raises(InputError, match="expected a scale per row with clip search"):
        _ = Quantizer(SMALL, QuantConfig(rules=("*.c_q.*=int4/8@search",))).formats


def test_a_row_of_zeros_and_a_tiny_one_decode_to_finite_weights():
    w = torch.zeros(1, 3, 64)
    w[0, 1] = 1e-9 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    w[0, 2, 5] = 3.0
    spec = RowQuant(bits=6, clip="deviation", deviations=12.0)
    for codes, scale in (
        quantizers.clip_search(w, RowQuant(bits=6)),
        (
            quantize_rows(w, spec, impl="eager")[0],
            quantizers.hessian_scales(w, torch.eye(64)[None], spec, 0.2, 0.01),
        ),
    ):
        assert (scale > 0).all() and (codes * scale.float()[..., None]).isfinite().all()
