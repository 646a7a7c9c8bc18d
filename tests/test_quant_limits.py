"""Where quantization ends: what is refused, what a rank without work does, what the forecast counts."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import SMALL, lively

from golfgpt.cli import main
from golfgpt.config import EvalConfig, QuantConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.quant import artifact, calibration
from golfgpt.quant.budget import forecast_bytes
from golfgpt.quant.formats import QuantizedTensor, TensorFormat
from golfgpt.quant.gptq import solve
from golfgpt.quant.quantizer import Quantizer
from golfgpt.recipes import get
from golfgpt.train import train as training

pytestmark = pytest.mark.numeric
CPU = Ranks(0, 1, torch.device("cpu"))
GPTQ = QuantConfig(bits=4, keep_numel=0, method="gptq")


def encode(quant: QuantConfig) -> dict[str, QuantizedTensor]:
    model, quantizer = lively(), Quantizer(SMALL, quant)
    ids = torch.randint(97, (4, 40), generator=torch.Generator().manual_seed(1))
    found = calibration.hessians(model, [(ids, None)], quantizer, CPU, torch.float32)
    return quantizer.encode({name: p.detach() for name, p in model.named_parameters()}, found)


@pytest.mark.parametrize("hessian", [torch.full((1, 256, 256), 1e6), 1e-42 * torch.eye(256)[None]])
def test_an_inverse_that_is_not_positive_definite_is_an_error(hessian):
    w = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0))
    with pytest.raises(torch.linalg.LinAlgError):
        solve(w, hessian, w.abs().amax(-1, keepdim=True) / 7, 7, damping=1e-6)


def test_hessian_clip_with_groups_of_columns():
    quant = replace(GPTQ, clip="deviation", deviations=3.0, hessian_clip=0.2, rules=("*.mlp.fc.*=int4/16@3",))
    with pytest.raises(InputError, match="expected a scale per row"):
        _ = Quantizer(SMALL, quant).formats


def test_wide_columns_that_no_tensor_can_have_are_refused():
    with pytest.raises(InputError, match=r"quant\.wide_columns is 8; expected at most 0"):
        encode(replace(GPTQ, bits=8, wide_columns=8))


def test_codes_of_gptq_are_those_of_stored_scales():
    with pytest.raises(ValueError, match=r"quant\.codes_from is float32_scale; expected stored_scale"):
        replace(GPTQ, codes_from="float32_scale")
    with pytest.raises(InputError, match=r"quant\.method is gptq, but no matrix is stored as integers"):
        _ = Quantizer(SMALL, replace(GPTQ, rules=("*=float16",))).formats


def test_a_rank_without_a_batch_of_samples(tiny):
    """It sums zeros, as often as the others sum."""
    quant = replace(tiny.quant, method="gptq", calibration="samples", calibration_tokens=512)
    ranks, summed = [SimpleNamespace(rank=r, world=2, device=CPU.device) for r in range(2)], [[], []]
    for rank, sums in zip(ranks, summed, strict=True):
        rank.raise_on_any = contextlib.nullcontext
        rank.sum_ = lambda x, sums=sums: sums.append(x.shape) or x
        calibration.calibrate(replace(tiny, quant=quant), lively(tiny.model), None, rank, torch.float32)
    assert summed[0] == summed[1]


@pytest.mark.parametrize("case", ["eval.stride", "seq_len"])
def test_the_trial_of_samples_is_not_refused_for_its_short_length(tiny, corpus, case):
    config = replace(tiny, eval=EvalConfig(stride=16))
    if case == "seq_len":
        config = replace(tiny, data=replace(tiny.data, seq_len=100, batch_tokens=800), eval=EvalConfig())
    quant = replace(tiny.quant, method="gptq", calibration="samples", calibration_tokens=512)
    config, data = replace(config, quant=quant), Dataset.open(corpus)
    assert calibration.seconds_needed(config, lively(tiny.model), data, CPU, torch.float32) > 0


def test_the_trial_reads_no_more_than_the_data_have(tiny, corpus):
    """A step of more tokens than the training data is allowed."""
    quant = replace(tiny.quant, method="gptq", calibration_tokens=1000)
    config = replace(tiny, data=replace(tiny.data, batch_tokens=2**18), quant=quant)
    data = Dataset.open(corpus)
    assert data.train_tokens < 2**18
    assert calibration.seconds_needed(config, lively(tiny.model), data, CPU, torch.float32) > 0


def test_a_run_stopped_before_its_reserve_was_stored_resumes(tiny, tmp_path, monkeypatch):
    quant = replace(tiny.quant, method="gptq", calibration_tokens=1024)
    config = replace(tiny, quant=quant, schedule=replace(tiny.schedule, max_steps=2, max_seconds=100.0))

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "choose_execution", stopped)
        with pytest.raises(KeyboardInterrupt):
            training.train(config, tmp_path / "run")
    assert training.train(config, tmp_path / "run", resume=True)["steps"] == 2


def test_the_forecast_counts_corrections_and_wide_columns():
    config = get("frontier").config
    plain, low = (forecast_bytes(Quantizer(config.model, replace(config.quant, low_rank=r))) for r in (0, 64))
    assert low > plain
    quantizer = Quantizer(SMALL, replace(GPTQ, low_rank=4, wide_columns=8))
    blob = artifact.seal(
        encode(quantizer.config), model=SMALL, quant=quantizer.config, tokenizer_sha256="0" * 64, seq_len=8
    )
    info = artifact.unpack(blob).info
    plain = Quantizer(SMALL, GPTQ).payload_bytes
    assert plain < info.payload_bytes <= quantizer.payload_bytes < 1.05 * info.payload_bytes
    assert artifact.header_bytes(quantizer) >= info.file_bytes - info.compressed_bytes


def test_a_correction_of_any_rank_is_not_read():
    """Decoding takes `rank` passes over the matrix."""
    with pytest.raises(InputError, match="a correction of rank 9000"):
        TensorFormat((9000, 9000), "int8", "float16", rank=9000)


def test_inspect_shows_wide_columns_and_corrections(tmp_path, capsys):
    quant, path = replace(GPTQ, low_rank=3, wide_columns=8), tmp_path / "x.golf"
    artifact.write(path, encode(quant), model=SMALL, quant=quant, tokenizer_sha256="0" * 64, seq_len=8)
    assert main(["inspect", str(path), "--json"]) == 0
    shown = {tensor["format"] for tensor in json.loads(capsys.readouterr().out)["tensors"]}
    assert any("+8 wide" in format for format in shown) and any("+rank 3" in format for format in shown)


def test_a_correction_that_exceeds_float32_is_not_read():
    quant = replace(GPTQ, low_rank=2, scale_dtype="float32")
    encoded = encode(quant)
    (name, *_) = (name for name, tensor in encoded.items() if tensor.left is not None)
    for field in ("left_scale", "right_scale"):
        getattr(encoded[name], field).fill_(1e36)
    blob = artifact.seal(encoded, model=SMALL, quant=quant, tokenizer_sha256="0" * 64, seq_len=8)
    with pytest.raises(InputError, match="has weights that exceed float32"):
        artifact.unpack(blob)
