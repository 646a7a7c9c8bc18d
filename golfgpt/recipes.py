"""Recipes: named starting configurations, each derived from another with a few fields replaced.

A recipe that produced a published number is never edited; a new one gets a new name. Standard library only.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from golfgpt.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from golfgpt.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """A named configuration with the sentence that explains it."""

    name: str
    summary: str
    config: RunConfig


_baseline = RunConfig(
    schedule=ScheduleConfig(kind="warmdown_steps", warmdown_steps=1200),
    quant=QuantConfig(clip="quantile", scale_floor=1 / 127, codes_from="float32_scale", compressor="zlib"),
)

_demo = RunConfig(
    model=ModelConfig(num_layers=2, model_dim=192, num_heads=3, num_kv_heads=1, mlp_hidden=384),
    optim=OptimConfig(matrix_lr=0.02, scalar_lr=0.02, tied_embed_lr=0.025, muon_momentum_warmup_steps=100),
    schedule=ScheduleConfig(max_seconds=115.0, warmdown_frac=0.85),
    data=DataConfig(batch_tokens=2048, seq_len=256, microbatch_tokens=1024),
    quant=QuantConfig(keep_numel=4096),
    eval=EvalConfig(stride=128, batch_tokens=8192),
    runtime=RuntimeConfig(checkpoint_seconds=20.0),
)

_small = replace(
    _demo,
    model=ModelConfig(num_layers=6, model_dim=192, num_heads=3, num_kv_heads=1, mlp_hidden=384),
    schedule=replace(_demo.schedule, max_seconds=600.0, warmdown_frac=0.6),
    data=DataConfig(batch_tokens=4096, seq_len=512, microbatch_tokens=2048),
    eval=EvalConfig(batch_tokens=8192),
    runtime=RuntimeConfig(),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "baseline",
            "R0, the published naive baseline: 9 layers of width 512, tied 1024-token vocabulary, Muon and "
            "Adam, int8 rows with the published scale floor, zlib. 600 s on 8 GPUs.",
            _baseline,
        ),
        Recipe("small", "1.7 M parameters: ten minutes of training on two CPU cores.", _small),
        Recipe("demo", "0.7 M parameters: two minutes of training on two CPU cores.", _demo),
    )
}


def get(name: str) -> Recipe:
    """The recipe called `name`. Raises InputError with the closest name."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown recipe {name!r}{hint} Known: {', '.join(RECIPES)}")
    return RECIPES[name]
