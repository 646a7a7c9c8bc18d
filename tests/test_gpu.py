"""CUDA only: training and scoring with torch.compile and bfloat16, against the CPU and against eager."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from golfgpt_kernels.testing import assert_within_budget
from models import lively

pytest.importorskip("zstandard")  # bare GPU machines lack it

from golfgpt.config import EvalConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.score.evaluate import evaluate
from golfgpt.score.windows import Scorer, Windows, score_windows
from golfgpt.train.attention_backend import select_backend
from golfgpt.train.step import TrainStep
from golfgpt.train.train import train

pytestmark = pytest.mark.gpu


def test_compiled_bfloat16_losses_follow_the_cpu(tiny, corpus):
    """Eight steps: bf16 rounding moves a loss of about 5 nats by far less than 0.05."""
    dataset = Dataset.open(corpus)
    config = replace(tiny, runtime=replace(tiny.runtime, device="cuda"))
    cpu = TrainStep(tiny, dataset, Ranks(0, 1, torch.device("cpu")))
    gpu = TrainStep(config, dataset, Ranks(0, 1, torch.device("cuda", 0)))
    assert gpu.compiled and gpu.dtype == torch.bfloat16
    for step in range(8):
        pending = [(each, each.launch(step)) for each in (cpu, gpu)]
        a, b = (each.wait(launched) for each, launched in pending)
        assert b.loss == pytest.approx(a.loss, abs=0.05)
        for each, launched in pending:
            each.update(launched)


def test_end_to_end_on_cuda(tiny, tmp_path):
    config = replace(tiny, runtime=replace(tiny.runtime, device="cuda", warmup_steps=2, val_every=4))
    result = train(config, tmp_path / "run")
    assert result["steps"] == 8
    assert result["seconds"]["compile"] > 0


def test_captured_optimizer_step_is_the_eager_step(tiny, corpus):
    """Ten steps under a moving schedule; the graph reads learning rates and momentum from the device."""
    dataset = Dataset.open(corpus)
    config = replace(tiny, runtime=replace(tiny.runtime, device="cuda", warmup_steps=2))
    graphed = replace(config, runtime=replace(config.runtime, graph="optimizer"))
    trainers = [TrainStep(c, dataset, Ranks(0, 1, torch.device("cuda", 0))) for c in (config, graphed)]
    for trainer in trainers:
        trainer.warm_up(2)
    for step in range(10):
        for trainer in trainers:
            trainer.flat.gradients.copy_(torch.randn(trainer.flat.gradients.shape, generator=torch.manual_seed(step)))
            trainer.optimizers.step(1.0 - step / 20, 0.85 + step / 100)
    weights = [trainer.model.state_dict() for trainer in trainers]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    trainers[1].optimizers.muon.param_groups[0]["params"][0].grad = torch.zeros_like(trainers[1].model.c_q)
    with pytest.raises(RuntimeError, match="changed after the step was captured"):
        trainers[1].optimizers.step(1.0, 0.9)


def test_a_whole_run_with_a_captured_optimizer(tiny, tmp_path):
    runtime = replace(tiny.runtime, device="cuda", warmup_steps=2, graph="optimizer")
    assert train(replace(tiny, runtime=runtime), tmp_path / "run")["steps"] == 8


def test_a_captured_step_is_the_step(tiny, corpus):
    dataset = Dataset.open(corpus)
    config = replace(tiny, runtime=replace(tiny.runtime, device="cuda", warmup_steps=2, kernels="eager", graph="off"))
    graphed = replace(config, runtime=replace(config.runtime, graph="step"))
    trainers = [TrainStep(c, dataset, Ranks(0, 1, torch.device("cuda", 0))) for c in (config, graphed)]
    losses = []
    for trainer in trainers:
        trainer.warm_up(2)
        losses.append([])
        for step in range(4):
            pending = trainer.launch(step)
            trainer.update(pending)
            losses[-1].append(trainer.wait(pending).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_default_run_tries_kernels_attention_and_graphs(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = replace(tiny, runtime=replace(tiny.runtime, device="cuda", warmup_steps=2))
    train(config, tmp_path / "run")
    log = (tmp_path / "run" / "train.log").read_text()
    assert all(f"\n  {name}: " in log for name in ("mlp", "loss", "optimizer", "graph optimizer", "graph step"))
    failed = [line for line in log.splitlines() if "refused" in line or "failed" in line]
    assert not [line for line in failed if not line.startswith("  mlp_gluon: ")]  # which is for sm_90 only


def test_optimizer_step_does_not_synchronize(tiny, corpus):
    config = replace(tiny, runtime=replace(tiny.runtime, device="cuda"))
    trainer = TrainStep(config, Dataset.open(corpus), Ranks(0, 1, torch.device("cuda", 0)))
    trainer.optimizers.step(1.0, 0.9)  # state is created here
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.optimizers.step(1.0, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_fused_attention_backend_passes_the_probe(tiny):
    selection = select_backend("auto", tiny.model, [(4, 64)], Ranks(0, 1, torch.device("cuda")), torch.bfloat16)
    assert selection.backend != "math"
    assert list(selection.ms) == sorted(selection.ms, key=selection.ms.get)
    again = select_backend("auto", tiny.model, [(4, 64)], Ranks(0, 1, torch.device("cuda")), torch.bfloat16)
    assert again.ms == selection.ms and again.kept == bool(again.ms)


@pytest.mark.parametrize("documents", [False, True])
def test_the_compiled_evaluator_in_bfloat16_follows_the_eager_one_in_float32(tiny, documents):
    """A mean of 9,000 tokens: bf16 rounding moves each by some hundredths of a nat, to either side."""
    eval = EvalConfig(window=64, stride=48, max_tokens=9000, document_aware=documents)
    config = replace(tiny, eval=eval, runtime=replace(tiny.runtime, device="cuda"))
    dataset, ranks = Dataset.open(tiny.data.path), Ranks(0, 1, torch.device("cuda", 0))
    model = lively(tiny.model).cuda()
    eager = replace(config, runtime=replace(config.runtime, compile="off"))
    expected = evaluate(model, dataset, eager, ranks, dtype=torch.float32)
    got = evaluate(model, dataset, config, ranks, dtype=torch.bfloat16)
    assert (got.tokens, got.bytes, got.label) == (expected.tokens, expected.bytes, expected.label)
    assert got.val_loss == pytest.approx(expected.val_loss, abs=0.01)
    assert got.checks.windows == 1 + math.ceil((9000 - 64) / 48)  # the batch of the compiled shape holds them all
    assert (got.checks.other_document_change is not None) == documents


@pytest.mark.parametrize("document_start", [None, 1])
def test_a_compiled_suffix_scores_within_the_budget_of_whole_windows(document_start, monkeypatch):
    """Token by token in bf16, against float64; eager whole windows in bf16 set the budget."""
    model = lively().cuda()
    tokens = torch.randint(97, (2001,), generator=torch.manual_seed(0)).cuda()
    tokens[::37] = 1
    windows = Windows(2000, 64, 16)

    def read(start: int, stop: int) -> torch.Tensor:
        return torch.stack((tokens, tokens))[:, start:stop]

    def nats(dtype: torch.dtype, **options) -> torch.Tensor:
        scorer = Scorer(model, dtype, document_start=document_start, **options)
        with torch.no_grad():
            parts = [
                (part.positions[part.scored], -logprobs[part.scored])
                for _, part, logprobs in score_windows(scorer, read, windows, range(len(windows)), 16)
            ]
        places, values = map(torch.cat, zip(*parts, strict=True))
        assert torch.equal(places, torch.arange(1, 2001, device="cuda"))
        return values

    ours = nats(torch.bfloat16, compiled=True)
    monkeypatch.setattr(
        Scorer,
        "hidden",
        lambda self, ids, suffix: model(ids, dtype=self.dtype, document_start=document_start)[:, -suffix:],
    )
    assert_within_budget(ours, nats(torch.bfloat16), nats(torch.float64))
