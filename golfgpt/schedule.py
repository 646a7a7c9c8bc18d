"""Schedules as pure functions of (steps done, training seconds); standard library only."""

from __future__ import annotations

from golfgpt.config import OptimConfig, ScheduleConfig


def lr_multiplier(step: int, seconds: float, config: ScheduleConfig) -> float:
    """Factor on every base learning rate for the step that follows `step` completed steps.

    `seconds` is training time so far. kind="warmdown_steps" is upstream's rule: the warm-down's length in
    time is warmdown_steps times the mean step time so far, so slow first steps depress the rate.
    kind="warmdown_frac" decays linearly over the last fraction of whichever budget is further along.
    """
    if config.kind == "warmdown_frac":
        done = step / config.max_steps
        if config.max_seconds is not None:
            done = max(done, seconds / config.max_seconds)
        left = max(1.0 - done, 0.0)
        return left / config.warmdown_frac if left < config.warmdown_frac else 1.0
    if config.warmdown_steps == 0:
        return 1.0
    if config.max_seconds is None:
        left = max(config.max_steps - step, 0)
        return left / config.warmdown_steps if left <= config.warmdown_steps else 1.0
    warmdown = config.warmdown_steps * seconds / max(step, 1)
    left = max(config.max_seconds - seconds, 0.0)
    return left / warmdown if left <= warmdown and warmdown > 0 else 1.0


def muon_momentum(step: int, config: OptimConfig) -> float:
    """Muon's momentum for the step that follows `step` completed steps: a linear rise, then constant."""
    if config.muon_momentum_warmup_steps == 0:
        return config.muon_momentum
    frac = min(step / config.muon_momentum_warmup_steps, 1.0)
    return (1 - frac) * config.muon_momentum_warmup_start + frac * config.muon_momentum


def crosses_cap(begun: float, step_seconds: float, config: ScheduleConfig) -> bool:
    """Whether a step after the one that began at `begun` seconds could end beyond the cap.

    `step_seconds` is the slowest recent step; both steps are granted 5 % on top of it.
    """
    return config.max_seconds is not None and begun + 2.1 * step_seconds > config.max_seconds
