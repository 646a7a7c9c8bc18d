"""GPTQ: its solver against one written plainly, its Hessians, and runs and exports that use it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golfgpt_kernels import quantize_rows
from models import SMALL, lively, metrics, packed
from torch.profiler import ProfilerActivity, profile

import golfgpt
from golfgpt.cli import main
from golfgpt.config import LoopConfig, ModelConfig, QuantConfig, RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import BudgetError, InputError, NonFiniteError
from golfgpt.quant import artifact, calibration
from golfgpt.quant.formats import decode
from golfgpt.quant.gptq import solve
from golfgpt.quant.quantizer import Quantizer
from golfgpt.runs import write_config
from golfgpt.score.config import LoRAConfig, TTTConfig
from golfgpt.train.train import train

pytestmark = pytest.mark.numeric
CPU = Ranks(0, 1, torch.device("cpu"))


def plainly(w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, largest: int, damping: float) -> torch.Tensor:
    """Codes of one matrix: the inverse Hessian of the columns that are left, computed anew for every column."""
    h, w = h.double().clone(), w.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * h.diagonal().mean())
    order = h.diagonal().argsort(descending=True).tolist()
    codes = torch.zeros_like(w)
    for i, j in enumerate(order):
        codes[:, j] = (w[:, j] / scale).round().clamp(-largest, largest)
        error = w[:, j] - codes[:, j] * scale
        inverse = torch.linalg.inv(h[order[i:]][:, order[i:]])
        w[:, order[i:]] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes.to(torch.int8)


def problem(count: int = 3, rows: int = 9, cols: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices and Hessians; the second has an input that was always zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 40, cols, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(count, cols, cols, generator=generator, dtype=torch.float64)
    x[1, :, 4] = 0
    return torch.randn(count, rows, cols, generator=generator), x.mT @ x


@pytest.mark.parametrize("block", [1, 7, 128])
def test_the_solver_is_the_plain_one_for_every_matrix_of_a_batch(block):
    w, h = problem()
    scale = (w.abs().amax(-1) / 7).double()
    codes = solve(w, h, scale[..., None], 7, block=block)
    for i in range(3):
        assert torch.equal(codes[i], plainly(w[i], h[i], scale[i], 7, 0.01))
    assert not codes[1, :, 4].any(), "what was always zero has no weight"
    rounded = (w / scale[..., None]).round().clamp(-7, 7)

    def lost(codes: torch.Tensor) -> torch.Tensor:
        error = codes * scale[..., None] - w.double()
        return torch.einsum("nrc,ncd,nrd->n", error, h, error)

    assert (lost(codes) < 0.8 * lost(rounded)).all()


def test_columns_may_differ_in_scale_and_range():
    w, h = (x[:1] for x in problem())
    scale = (w.abs().amax(-1, keepdim=True) / 7).double().expand(w.shape).clone()
    largest = torch.full((20,), 7)
    scale[..., 3], largest[3] = scale[..., 3] / 16, 127
    codes = solve(w, h, scale, largest, least=-largest - 1)
    assert codes[..., 3].abs().max() > 8 >= codes[..., largest == 7].abs().max()


def test_a_hessian_that_is_not_positive_definite_is_named():
    w, h = problem()
    h[2] -= 2 * h[2].diagonal().max() * torch.eye(20)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"the Hessian of matrix 2 is not positive definite with damping 0\.01"
    ):
        solve(w, h, w.abs().amax(-1, keepdim=True).double(), 7)
    h[2] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match="the Hessian of matrix 2"):
        solve(w, h, w.abs().amax(-1, keepdim=True).double(), 7)


QUANT = QuantConfig(bits=4, rules=("*.attn.c_k.*=int5", "blocks.1.attn.c_q.*=float16"), keep_numel=0, method="gptq")


def test_hessians_are_sums_over_inputs_and_passes():
    config = replace(SMALL, loop=LoopConfig(first=1, last=2, passes=3))
    model, ids = lively(config), torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    quantizer = Quantizer(config, QUANT)
    found = calibration.hessians(model, [(ids, None), (ids, None)], quantizer, CPU, torch.float32)
    assert {name: tuple(h.shape) for name, h in found.items()} == {
        "tok_emb": (1, 48, 48), "c_q[0:1]": (1, 48, 48), "c_q[2:5]": (3, 48, 48), "c_k": (5, 48, 48),
        "c_v": (5, 48, 48), "attn_proj": (5, 48, 48), "mlp_fc": (5, 48, 48), "mlp_proj": (5, 80, 80),
    }  # fmt: skip
    hidden = model(ids).reshape(-1, 48)
    torch.testing.assert_close(found["tok_emb"][0], 2 * hidden.T @ hidden)
    assert torch.equal(found["c_k"], found["c_v"]) and torch.equal(found["c_k"][2:], found["c_q[2:5]"])
    # Normalized inputs: the trace counts the tokens that a layer has seen, on each of its passes.
    traces = found["c_k"].diagonal(dim1=1, dim2=2).sum(1) / (48 * 2 * 60)
    torch.testing.assert_close(traces, torch.tensor([1.0, 3, 3, 1, 1]), rtol=1e-3, atol=0)


def test_text_that_is_too_short_or_makes_no_sense():
    text, config = SimpleNamespace(train_tokens=500), RunConfig(quant=QuantConfig(calibration_tokens=501))
    with pytest.raises(InputError, match=r"quant\.calibration_tokens is 501; expected at most the 500 tokens"):
        calibration.calibrate(config, None, text, CPU, torch.float32)
    model = lively()
    model.mlp_fc.data[3] = torch.nan
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(NonFiniteError, match=r"the inputs of (mlp_proj|tok_emb) are not finite"):
        calibration.hessians(model, [(ids, None)], Quantizer(SMALL, replace(QUANT, rules=())), CPU, torch.float32)


@pytest.mark.parametrize("case", ["plain", "2026-04-27", "samples"])
def test_hessians_do_not_depend_on_ranks(tiny, corpus, case):
    """Three ranks see 3, 3 and 2 spans of every step; or six batches of samples, two each."""
    tiny = packed(tiny) if case == "2026-04-27" else tiny
    source = "samples" if case == "samples" else "train"
    dataset, model = Dataset.open(corpus), lively(tiny.model)
    quantizer = Quantizer(tiny.model, replace(tiny.quant, bits=5, method="gptq"))

    def found(ranks: Ranks) -> dict[str, torch.Tensor]:
        sums = []
        ranks = SimpleNamespace(rank=ranks.rank, world=ranks.world, device=ranks.device)
        ranks.sum_, ranks.raise_on_any = lambda x: sums.append(x.clone()), contextlib.nullcontext
        config = replace(tiny, quant=replace(quantizer.config, calibration_tokens=3000, calibration=source))
        calibration.calibrate(config, model, dataset, ranks, torch.float32)
        return sums

    alone, parts = found(CPU), [found(Ranks(rank, 3, CPU.device)) for rank in range(3)]
    assert all(torch.equal(whole, a + b + c) for whole, a, b, c in zip(alone, *parts, strict=True))


def test_a_run_and_an_export_ship_what_was_scored(tiny, tmp_path, capsys):
    """In training and again by export: the same codes, of the weights that fake quantization left."""
    quant = replace(
        tiny.quant, bits=4, clip="deviation", deviations=3.0, method="gptq", calibration_tokens=4096, qat="export"
    )
    config = replace(tiny, quant=quant, schedule=replace(tiny.schedule, max_seconds=500.0, reserve_seconds=60.0))
    result, run = train(config, tmp_path / "run"), tmp_path / "run"
    log = (run / "train.log").read_text()
    assert "gptq:codes chosen on 4,096 tokens of train, quantized again after fake quantization" in log
    assert result["seconds"]["calibrate"] > 0 and "more than schedule.max_seconds" not in log
    shipped = artifact.read(run / "model.golf").state
    model, _ = golfgpt.load(run)
    assert all(torch.equal(model.state_dict()[name], w) for name, w in shipped.items())
    assert metrics(run, "result")[0]["artifact_sha256"] == result["artifact_sha256"]
    assert main(["export", str(run), "--to", "golf", "--data", str(config.data.path)]) == 0
    assert (run / "export.golf").read_bytes() == (run / "model.golf").read_bytes()
    rounded = ["--quant.method", "rtn", "--out", str(run / "rounded.golf"), "--json"]
    capsys.readouterr()
    assert (
        main(["export", str(run), "--to", "golf", *rounded]) == 0
        and json.loads(capsys.readouterr().out)["source"] == "checkpoint"
    )
    other = artifact.read(run / "rounded.golf").state
    assert not torch.equal(other["mlp_fc"], shipped["mlp_fc"]) and torch.equal(other["q_gain"], shipped["q_gain"])


def test_scales_are_those_of_rounding():
    model, quantizer = lively(), Quantizer(SMALL, replace(QUANT, rules=("*.mlp.fc.*=int4/16",), code_range="full"))
    ids = torch.randint(97, (4, 40), generator=torch.Generator().manual_seed(1))
    state = {name: p.detach() for name, p in model.named_parameters()}
    found = calibration.hessians(model, [(ids, None)], quantizer, CPU, torch.float32)
    solved, rounded = quantizer.encode(state, found), quantizer.encode(state)
    for name, tensor in rounded.items():
        assert torch.equal(solved[name].values, tensor.values) != tensor.format.quantized, name
        assert tensor.scale is None or torch.equal(solved[name].scale, tensor.scale)
    assert solved["mlp_fc"].scale.shape == (5, 80, 3) and decode(solved)["mlp_fc"].shape == (5, 80, 48)


def test_a_tied_embedding_has_a_damping_of_its_own():
    model, ids = lively(), torch.randint(97, (4, 40), generator=torch.Generator().manual_seed(1))
    state, quant = model.state_dict(), replace(QUANT, rules=(), damping=0.03, embed_damping=0.5)
    found = calibration.hessians(model, [(ids, None)], Quantizer(SMALL, quant), CPU, torch.float32)
    encoded = Quantizer(SMALL, quant).encode(state, found)
    for name, damping in (("tok_emb", 0.5), ("c_v", 0.03)):
        w, tensor = state[name].view(-1, *state[name].shape[-2:]), encoded[name]
        scale = tensor.scale.float().view(*w.shape[:-1], 1)
        units = zip(*(x.split(4) for x in (w, found[name], scale)), strict=True)
        codes = torch.cat([solve(*unit, 7, damping=damping) for unit in units])
        assert torch.equal(codes.view_as(tensor.values), tensor.values)


def test_rules_with_deviations():
    config = ModelConfig(num_layers=3, model_dim=64, num_heads=4, num_kv_heads=2, mlp_hidden=96)
    rules = ("tok_emb.weight=int7@14", "blocks.1.*.c_q.*=int6@11.5", "*.mlp.fc.*=int5/32@3")
    quant = QuantConfig(bits=6, clip="deviation", deviations=13.0, rules=rules, keep_numel=0)
    quantizer = Quantizer(config, quant)
    chosen = {name: quantizer.spec(name).deviations for name, format in quantizer.formats.items() if format.quantized}
    assert chosen == {
        "tok_emb": 14, "c_q[0:1]": 13, "c_q[1:2]": 11.5, "c_q[2:3]": 13, "c_k": 13, "c_v": 13, "attn_proj": 13,
        "mlp_fc": 3, "mlp_proj": 13,
    }  # fmt: skip
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    scale = quantize_rows(w, quantizer.spec("tok_emb"))[1]
    torch.testing.assert_close(scale, (14 * w.std(1) / 63).half())
    with pytest.raises(ValueError, match=r"quant\.clip is max and quant\.deviations is 3"):
        QuantConfig(deviations=3.0)
    with pytest.raises(ValueError, match=r"quant\.clip is deviation and quant\.deviations is 0; expected a positive"):
        QuantConfig(clip="deviation")
    by_rule = Quantizer(config, QuantConfig(rules=("tok_emb.weight=int8@20", "*.c_k.*=int8@quantile"), keep_numel=0))
    assert [by_rule.spec(name).clip for name in ("tok_emb", "c_k", "c_v")] == ["deviation", "quantile", "max"]
    with pytest.raises(ValueError, match=r"quant\.rules: got 'a=float16@3'"):
        QuantConfig(rules=("a=float16@3",))


def test_the_reserve_is_a_trial_times_its_part(tiny, monkeypatch):
    """A step's text, or samples of a quarter of the length, in two seconds: four of them, and a tenth or a quarter."""
    quant = replace(tiny.quant, method="gptq", calibration_tokens=4 * tiny.data.batch_tokens)
    config = replace(tiny, quant=quant, schedule=replace(tiny.schedule, max_steps=100_000, max_seconds=30.0))
    clock = [0.0]

    def hessians(model, text, *_):
        clock[0] += 2.0

    monkeypatch.setattr(calibration, "hessians", hessians)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: clock[0])
    assert calibration.seconds_needed(config, None, None, CPU, torch.float32) == pytest.approx(1.1 * 4 * 2)
    samples = replace(config, quant=replace(quant, calibration="samples"))
    assert calibration.seconds_needed(samples, None, None, CPU, torch.float32) == pytest.approx(1.25 * 4 * 2)


def test_a_run_reserves_the_time_that_a_trial_took(tiny, tmp_path, monkeypatch):
    quant = replace(tiny.quant, method="gptq", calibration_tokens=4096)
    config = replace(tiny, quant=quant, schedule=replace(tiny.schedule, max_seconds=100.0))
    result, run = train(config, tmp_path / "run"), tmp_path / "run"
    stored = json.loads((run / "config.json").read_text())["schedule"]["reserve_seconds"]
    assert (
        0 < stored < 100 and f"reserve:{stored:.1f}s for calibration on 4,096 tokens" in (run / "train.log").read_text()
    )
    assert result["quantized_again"] is False
    monkeypatch.setattr("golfgpt.train.progress.HOPELESS", math.inf)
    with pytest.raises(BudgetError, match=r"calibration would take about .* of schedule\.max_seconds"):
        train(replace(config, schedule=replace(config.schedule, max_seconds=1e-3)), tmp_path / "short")


def test_a_run_calibrated_on_its_own_samples(tiny, tmp_path):
    quant = replace(tiny.quant, bits=4, method="gptq", calibration="samples", calibration_tokens=2000)
    config = replace(tiny, quant=quant)
    train(config, tmp_path / "run")
    assert "codes chosen on 2,000 tokens of samples" in (tmp_path / "run" / "train.log").read_text()
    model, _ = golfgpt.load(tmp_path / "run")
    shipped = artifact.read(tmp_path / "run" / "model.golf").state
    assert all(torch.equal(model.state_dict()[name], w) for name, w in shipped.items())
    data = shutil.copytree(config.data.path, tmp_path / "data")
    command = ["export", str(tmp_path / "run"), "--to", "golf", "--data", str(data)]
    assert main(command) == 0
    # Calibration asks nothing of the text that is scored.
    write_config(
        tmp_path / "run",
        replace(config, eval=replace(config.eval, ttt=TTTConfig(kind="phased", lora=LoRAConfig(rank=4)))),
    )
    with open(next(data.glob("*_val_*.bin")), "ab") as file:
        file.seek(-2, os.SEEK_END)
        file.truncate()
        file.write(b"\x05\x00")
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "run" / "export.golf").read_bytes() == (tmp_path / "run" / "model.golf").read_bytes()


def test_matrices_that_are_too_small():
    for fields, message in (
        ({"low_rank": 49}, r"quant\.low_rank is 49; expected at most 48"),
        ({"bits": 7, "wide_columns": 81, "method": "gptq"}, r"quant\.wide_columns is 81; expected at most 80"),
        ({"clip": "deviation", "deviations": 3.0, "rules": ("tok_emb.*=int8/1",)}, "has one column per scale"),
    ):
        with pytest.raises(InputError, match=message):
            _ = Quantizer(SMALL, QuantConfig(keep_numel=0, **fields)).formats


def test_hessians_take_the_place_of_their_sums():
    """Not more than twice the bytes of all Hessians in float32, those of one input counted once."""
    config = replace(SMALL, model_dim=96, num_heads=6, mlp_hidden=384)
    model, ids = lively(config), torch.randint(97, (1, 4), generator=torch.Generator().manual_seed(1))
    quantizer = Quantizer(config, QuantConfig(keep_numel=0, method="gptq"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        found = calibration.hessians(model, [(ids, None)], quantizer, CPU, torch.float32)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    unique = {h.untyped_storage().data_ptr(): h.untyped_storage().nbytes() for h in found.values()}
    weights, largest = sum(p.nbytes for p in model.parameters()), 8 * 384 * 384  # a product, before it is added
    assert len(unique) == 5 and peak <= 2 * sum(unique.values()) + largest + weights
