"""bench.published_frontier computes what golfgpt's model computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import published_frontier
from golfgpt.config import LoopConfig, ModelConfig, ParallelConfig
from golfgpt.model.gpt import GPT
from golfgpt.model.segments import Segments
from golfgpt.published.names import from_published
from golfgpt.recipes import get

TOKENS = 40


def tiny() -> ModelConfig:
    """The mechanisms of `frontier` in 5 layers: 0, then 1 and 2 three times, then 3 and 4 in two lanes."""
    return replace(
        get("frontier").config.model, vocab_size=64, num_layers=5, model_dim=32, num_heads=4, num_kv_heads=2,
        mlp_hidden=48, rope_dims=4, gate_window=6, xsa_layers=tuple(range(5)),
        loop=LoopConfig(first=1, last=2, passes=3, start=0.35), parallel=ParallelConfig(kind="routed", first=3),
    )  # fmt: skip


def test_loss_and_gradients_are_golfgpts():
    torch.manual_seed(0)
    plain = published_frontier.Model(tiny(), TOKENS, torch.float32)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model = GPT(tiny())
    model.load_state_dict(from_published(plain.state_dict(), tiny()))
    ids, targets = torch.randint(2, 64, (2, 1, TOKENS))
    ids[0, [0, 9, 30]] = 1  # documents; the second one is cut after 16 tokens
    segments = Segments.of(torch.tensor([0, 9, 25, 30, TOKENS, TOKENS], dtype=torch.int32), TOKENS, 16)
    losses = plain(ids, targets, segments), model.loss(ids, targets, segments=segments)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    expected = from_published({name: p.grad for name, p in plain.named_parameters()}, tiny())
    for name, p in model.named_parameters():
        assert expected[name].any(), name
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4 * expected[name].abs().max().item())


def test_other_mechanisms_are_refused():
    with pytest.raises(ValueError, match="has the mechanisms of the recipe frontier"):
        published_frontier.Model(get("varlen").config.model, TOKENS, torch.float32)
