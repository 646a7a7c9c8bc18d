"""Learning rates, their schedule, and averages of the weights. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from golfgpt.fields import (
    Count,
    CountOrZero,
    Fraction,
    FractionAboveZero,
    FractionBelowOne,
    Limit,
    NotNegative,
    Positive,
    Section,
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Muon for the matrices of the blocks, Adam for the embedding, the head and everything else."""

    matrix_lr: NotNegative = 0.04
    """Muon's base learning rate."""
    scalar_lr: NotNegative = 0.04
    """Adam's base learning rate for gains, scales and mixes."""
    tied_embed_lr: NotNegative = 0.05
    """Adam's base learning rate for a tied embedding."""
    embed_lr: NotNegative = 0.6
    """Adam's base learning rate for an untied embedding."""
    head_lr: NotNegative = 0.008
    """Adam's base learning rate for an untied head."""
    muon_momentum: FractionBelowOne = 0.95
    """Muon's momentum after its warm-up."""
    muon_momentum_warmup_start: FractionBelowOne = 0.85
    """Muon's momentum at step 0."""
    muon_momentum_warmup_steps: CountOrZero = 500
    """Steps over which the momentum rises linearly; 0 starts at the final value."""
    muon_ns_steps: Count = 5
    """Newton-Schulz iterations."""
    muon_row_norm: bool = False
    """Whether Muon divides the rows of what it orthogonalizes by their norms first (MuonEq-R)."""
    muon_variance_beta: FractionBelowOne = 0.0
    """Decay of the running mean square of each row of Muon's update, by whose root it is divided (NorMuon); 0: off."""
    adam_beta1: FractionBelowOne = 0.9
    """Adam's decay of the mean gradient."""
    adam_beta2: FractionBelowOne = 0.95
    """Adam's decay of the mean squared gradient."""
    adam_eps: NotNegative = 1e-8
    """Adam's addend to the root of the mean squared gradient."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of every group: w <- w (1 - lr * weight_decay) - update."""
    grad_clip_norm: NotNegative = 0.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    embed_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the token embedding and the pair table and of Adam's moments for them. bfloat16, as published, loses
    late updates that are smaller than its rounding."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """When training stops and how the learning rate falls."""

    max_steps: Count = 20_000
    """Optimizer steps at most."""
    max_seconds: Positive | None = 600.0
    """Training seconds at most (compilation, warm-up, checkpoints and evaluation are not counted); None: no cap."""
    kind: Literal["warmdown_steps", "warmdown_frac"] = "warmdown_frac"
    """warmdown_steps: upstream's rule, a number of steps turned into time by the mean step;
    warmdown_frac: the last fraction of the budget, whichever of steps and seconds is further along."""
    warmdown_steps: CountOrZero = 1200
    """Length of the decay to zero for kind=warmdown_steps; 0 keeps the rate constant."""
    warmdown_frac: Fraction = 0.4
    """Fraction of the budget spent decaying for kind=warmdown_frac, 0 to 1."""
    warmdown_shape: Literal["linear", "cosine"] = "linear"
    """Shape of the decay; cosine is half a period, from 1 to 0."""
    warmdown_max_frac: FractionAboveZero | None = None
    """Longest decay as a fraction of max_seconds for kind=warmdown_steps; R5 has 0.5, which makes its recipe
    another one where steps are slow. None: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmdown_max_frac and (self.kind != "warmdown_steps" or self.max_seconds is None):
            raise ValueError(
                f"schedule.warmdown_max_frac {self.warmdown_max_frac} limits kind=warmdown_steps with max_seconds; got "
                f"kind {self.kind}, max_seconds {self.max_seconds}"
            )


@dataclass(frozen=True, kw_only=True)
class AverageConfig(Section):
    """Averaging of the weights over the last part of training; the average is what is exported."""

    kind: Literal["none", "swa", "ema"] = "none"
    """swa: the mean of every swa_every-th step's weights once the learning rate has fallen below swa_start_lr;
    ema: a mean that forgets, updated at every step."""
    swa_start_lr: FractionAboveZero = 0.4
    """Learning-rate multiplier below which steps are averaged."""
    swa_every: Count = 50
    """Steps between averaged weights."""
    ema_decay: Annotated[Positive, Limit("<", 1)] = 0.997
    """Weight of the old mean at each step; the start's share is divided out."""
    sums: Literal["float32", "parameter"] = "float32"
    """Dtype of the sums; "parameter", as published, adds bfloat16 embeddings in bfloat16 (an error of 2 % in 48)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sums != "float32" and self.kind != "swa":
            raise ValueError(f"average.sums {self.sums} is for average.kind swa, got kind {self.kind}")
