"""Models and configurations for tests."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from golfgpt_kernels import fake_quantize_rows

from golfgpt.config import (
    BigramConfig,
    BudgetConfig,
    DataConfig,
    EvalConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from golfgpt.model.gpt import GPT
from golfgpt.quant import compute_copies
from golfgpt.quant.quantizer import FakeQuant
from golfgpt.train import checkpoint

SMALL = ModelConfig(vocab_size=97, num_layers=5, model_dim=48, num_heads=4, num_kv_heads=2, mlp_hidden=80)


def lively(config: ModelConfig = SMALL, seed: int = 0) -> GPT:
    """A model whose zero-initialized projections are not zero."""
    model = GPT(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def latest_record(config: ModelConfig, start: float = 0.0) -> ModelConfig:
    """`config` with all that the record of 2026-04-27 has, and its loop from `start` on."""
    layers = tuple(range(config.num_layers))
    return replace(
        config, mlp_slope=0.5, rope_dims=4, ln_scale=True, xsa_layers=layers, skip_gates=True, attn_gate="sparse",
        attn_gate_scale=0.5, smear_gate="input", document_start=1,
        loop=LoopConfig(first=1, last=1, passes=3, start=start),
        parallel=ParallelConfig(kind="routed", first=config.num_layers - 1),
    )  # fmt: skip


def packed(config: RunConfig, start: float = 0.0) -> RunConfig:
    """`config` with the model of the latest record, its rows of documents and its clip."""
    return replace(
        config,
        model=latest_record(config.model, start),
        data=replace(config.data, order="packed", document_start=1),
        optim=replace(config.optim, grad_clip_norm=0.05, grad_clip="span", weight_decay=0.1, weight_decay_end=0.5),
    )


def unseen(config: ModelConfig) -> ModelConfig:
    """`config` with other values, or defaults, in the fields that its published tensors show."""
    lanes, values = config.parallel, config.value_embedding
    return replace(
        config, vocab_size=3000, model_dim=2 * config.model_dim, num_kv_heads=1, mlp_hidden=7, tie_embeddings=True,
        bigram=BigramConfig(), attn_gate="none", skip_gates=False,
        gate_window=3 if config.reads_window else config.gate_window,
        smear_gate="input" if config.document_start else "none" if config.smear_gate == "input" else config.smear_gate,
        parallel=replace(lanes, kind="off") if lanes.kind in ("merged", "routed") else lanes,
        value_embedding=replace(values, dim=5) if values.dim else values,
    )  # fmt: skip


def in_banks(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published state as the scripts with banks have it."""
    out = dict(state)
    for bank, kinds in BANKS.items():
        layers = sum(name.endswith(f"{kinds[0]}.weight") for name in state)
        out[bank] = torch.stack([out.pop(f"blocks.{i}.{kind}.weight") for kind in kinds for i in range(layers)])
    return out


BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}


def fake_quantized(
    model: GPT, fake_quant: FakeQuant, enabled: torch.Tensor | None = None, impl: str = "auto"
) -> dict[str, torch.Tensor]:
    """`stand_ins` of the model's parameters: as the artifact will hold them, with straight-through gradients."""
    with mock.patch.object(compute_copies, "fake_quantize_rows", functools.partial(fake_quantize_rows, impl=impl)):
        banks = {name: (model.get_parameter(name), groups) for name, groups in fake_quant.items()}
        return {name: compute_copies.fake_quantized(w, groups, enabled) for name, (w, groups) in banks.items()}


def tiny_config(corpus: Path) -> RunConfig:
    """Eight steps of a 0.05 M parameter model; no clock, so that runs can be compared bit for bit."""
    return RunConfig(
        model=ModelConfig(vocab_size=384, num_layers=3, model_dim=48, num_heads=3, num_kv_heads=1, mlp_hidden=64),
        optim=OptimConfig(muon_momentum_warmup_steps=4),
        schedule=ScheduleConfig(max_steps=8, max_seconds=None),
        data=DataConfig(path=str(corpus), batch_tokens=1024, seq_len=64),
        quant=QuantConfig(keep_numel=1000),
        eval=EvalConfig(window=64, stride=48, max_tokens=4000),
        budget=BudgetConfig(code_bytes=60_000),  # counting takes ten seconds
        runtime=RuntimeConfig(device="cpu", dtype="float32", checkpoint_seconds=0, compile="off"),
    )


def metrics(path: Path, kind: str) -> list[dict]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def final_weights(path: Path) -> dict[str, torch.Tensor]:
    found, refused = checkpoint.latest(path / "checkpoints")
    assert not refused
    return found.model
