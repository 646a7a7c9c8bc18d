"""Config of the optimizers, the schedule and the averaging of weights. Standard library only."""

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
    """Optimizers: Muon for matrices, Adam for the embedding, the head and all other parameters."""

    matrix_lr: NotNegative = 0.04
    """Muon's base learning rate."""
    scalar_lr: NotNegative = 0.04
    """Adam's base learning rate for gains, scales and mixes."""
    tied_embed_lr: NotNegative = 0.05
    """Adam's base learning rate for a tied embedding and, with it, the pair table."""
    embed_lr: NotNegative = 0.6
    """Adam's base learning rate for an untied embedding and, with it, the pair table."""
    head_lr: NotNegative = 0.008
    """Adam's base learning rate for an untied head."""
    muon_momentum: FractionBelowOne = 0.95
    """Muon's momentum after its warm-up."""
    muon_momentum_warmup_start: FractionBelowOne = 0.85
    """Muon's momentum at step 0."""
    muon_momentum_warmup_steps: CountOrZero = 500
    """Steps over which the momentum rises linearly; 0: start at the final value."""
    muon_ns_steps: Count = 5
    """Newton-Schulz iterations per step."""
    muon_coefficients: Literal["quintic", "polar_express", "polar_express_5"] = "quintic"
    """Coefficients of the iterations. quintic: Muon's own; polar_express_5: those of the records from 2026-04-23 on;
    polar_express: the paper's."""
    muon_row_norm: bool = False
    """Whether Muon normalizes the rows of each matrix before it orthogonalizes the matrix (MuonEq-R)."""
    muon_variance_beta: FractionBelowOne = 0.0
    """Decay of the running mean square of each row of Muon's update. The row is divided by its root (NorMuon). 0:
    off."""
    adam_beta1: FractionBelowOne = 0.9
    """Adam's decay of the mean gradient."""
    adam_beta2: FractionBelowOne = 0.95
    """Adam's decay of the mean squared gradient."""
    adam_eps: NotNegative = 1e-8
    """Adam's epsilon, added to the root of the mean squared gradient."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, w <- w (1 - lr * weight_decay) - update, of all parameters without one of their own."""
    embed_weight_decay: NotNegative | None = None
    """That of embeddings and the head; None: weight_decay."""
    scalar_weight_decay: NotNegative | None = None
    """That of gains, scales and mixes; None: weight_decay."""
    weight_decay_end: Fraction = 1.0
    """Factor of Muon's weight decay at the end of the budget (0.5 in 2026-04-18)."""
    weight_decay_taper: FractionBelowOne = 0.7
    """Fraction of the budget from which that factor goes linearly from 1 to weight_decay_end."""
    projections: Literal["muon", "adam"] = "muon"
    """What updates the projections of pair table and value embedding: Muon, or Adam with scalar_lr and
    scalar_weight_decay (2026-03-25)."""
    grad_clip_norm: NotNegative = 0.0
    """Maximum global gradient norm, for clipping; 0: no clipping."""
    grad_clip: Literal["step", "span"] = "step"
    """What is clipped: the gradient of the step, or, as a flaw of the records with banks (2026-03-25 and from
    2026-04-10 on), that of each span before they are summed."""
    embed_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the token embedding, the pair table and their Adam moments. bfloat16, as published, loses late updates
    that are smaller than its rounding error."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """When training stops, and how the learning rate decays."""

    max_steps: Count = 20_000
    """Maximum number of optimizer steps."""
    max_seconds: Positive | None = 600.0
    """Maximum training time in seconds, without compilation, warm-up, checkpoints and evaluation; None: no limit."""
    reserve_seconds: NotNegative | None = None
    """Part of max_seconds in which nothing is trained, for the calibration of quant.method gptq. None: what a small
    calibration in the warm-up, timed, says that it takes; without gptq nothing. Published runs fix a number."""
    kind: Literal["warmdown_steps", "warmdown_frac"] = "warmdown_frac"
    """Which rule sets the length of the decay. warmdown_steps: as published, a number of steps, converted to time with
    the mean step time. warmdown_frac: the last fraction of the budget of steps or of seconds, whichever is closer
    to its end."""
    warmdown_steps: CountOrZero = 1200
    """Steps of the decay to zero, for kind=warmdown_steps; 0: constant learning rate."""
    warmdown_frac: Fraction = 0.4
    """Fraction of the budget over which the rate decays, for kind=warmdown_frac; 0 to 1."""
    warmdown_shape: Literal["linear", "cosine"] = "linear"
    """Shape of the decay. cosine: half a period, from 1 to 0."""
    min_lr: Fraction = 0.0
    """Lowest learning-rate multiplier. With more than 0, weights are good only as a moving average (average.kind)."""
    warmdown_max_frac: FractionAboveZero | None = None
    """Maximum length of the decay as a fraction of max_seconds, for kind=warmdown_steps; None: no limit. Recipe
    int5-int6-swa has 0.5, which changes its schedule on machines with slow steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmdown_max_frac and (self.kind != "warmdown_steps" or self.max_seconds is None):
            raise ValueError(
                f"schedule.warmdown_max_frac {self.warmdown_max_frac} expected kind warmdown_steps and a number for "
                f"max_seconds, got kind {self.kind} and max_seconds {self.max_seconds}; drop it or change them"
            )
        if self.reserve_seconds and self.reserve_seconds >= (self.max_seconds or 0):
            raise ValueError(
                f"schedule.reserve_seconds is {self.reserve_seconds:g}; expected less than schedule.max_seconds, "
                f"{self.max_seconds}"
            )

    @property
    def decays(self) -> bool:
        """Whether the learning rate is to decay."""
        return self.warmdown_frac > 0 if self.kind == "warmdown_frac" else self.warmdown_steps > 0

    @property
    def cap(self) -> float | None:
        """Seconds in which training must end; None: no limit."""
        return None if self.max_seconds is None else self.max_seconds - (self.reserve_seconds or 0.0)


@dataclass(frozen=True, kw_only=True)
class AverageConfig(Section):
    """Averaging of the weights over the last part of training. The average is exported."""

    kind: Literal["none", "swa", "ema"] = "none"
    """swa: the mean of the weights of every swa_every-th step, once the learning rate is below swa_start_lr.
    ema: an exponential moving average, updated at every step."""
    swa_start_lr: FractionAboveZero = 0.4
    """Learning-rate multiplier below which swa averages steps."""
    swa_every: Count = 50
    """Steps between the weights that swa averages."""
    ema_decay: Annotated[Positive, Limit("<", 1)] = 0.997
    """Weight of the old mean at each step."""
    ema_start: Literal["zero", "initial"] = "zero"
    """What the moving average starts from. zero: nothing, and its bias is divided out; initial, as published: the
    initial weights, which matter for about 5 / (1 - ema_decay) steps."""
    sums: Literal["float32", "parameter"] = "float32"
    """Dtype of the sums. parameter, as published, sums bfloat16 embeddings in bfloat16, which makes an error of 2 %
    after 48 sums."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_start != "zero" and self.kind != "ema":
            raise ValueError(f"average.ema_start {self.ema_start} expected average.kind ema, got {self.kind}")
        if self.sums != "float32" and self.kind != "swa":
            raise ValueError(
                f"average.sums {self.sums} expected average.kind swa, got {self.kind}; use average.sums float32 or "
                "kind swa"
            )
