"""Models for tests."""

from __future__ import annotations

import torch

from golfgpt.config import ModelConfig
from golfgpt.model import GPT

SMALL = ModelConfig(vocab_size=97, num_layers=5, model_dim=48, num_heads=4, num_kv_heads=2, mlp_hidden=80)


def lively(config: ModelConfig = SMALL, seed: int = 0) -> GPT:
    """A model whose zero-initialized projections are not zero."""
    model = GPT(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model
