"""CUDA only: training with torch.compile and bfloat16, against the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from golfgpt.attention import select_backend
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.train import train
from golfgpt.trainer import Trainer

pytestmark = pytest.mark.gpu


def test_compiled_bfloat16_losses_follow_the_cpu(tiny, corpus):
    """Eight steps: bf16 rounding moves a loss of about 5 nats by far less than 0.05."""
    dataset = Dataset.open(corpus)
    config = replace(tiny, runtime=replace(tiny.runtime, device="cuda"))
    cpu = Trainer(tiny, dataset, Ranks(0, 1, torch.device("cpu")))
    gpu = Trainer(config, dataset, Ranks(0, 1, torch.device("cuda", 0)))
    assert gpu.compiled and gpu.dtype == torch.bfloat16
    for step in range(8):
        a, b = cpu.accumulate(step), gpu.accumulate(step)
        assert b.loss == pytest.approx(a.loss, abs=0.05)
        cpu.update(step, a)
        gpu.update(step, b)


def test_end_to_end_on_cuda(tiny, tmp_path):
    config = replace(tiny, runtime=replace(tiny.runtime, device="cuda", warmup_steps=2, val_every=4))
    result = train(config, tmp_path / "run")
    assert result["steps"] == 8
    assert result["seconds"]["compile"] > 0


def test_a_fused_attention_backend_passes_the_probe(tiny):
    name, _ = select_backend("auto", tiny.model, [64], torch.device("cuda"), torch.bfloat16)
    assert name != "math"
