"""Schedules as pure functions of completed steps and training seconds. Standard library only."""

from __future__ import annotations

import math

from golfgpt.config import OptimConfig, QuantConfig, ScheduleConfig


def budget_used(step: int, seconds: float, config: ScheduleConfig) -> float:
    """Fraction of the training budget that is used after `step` completed steps and `seconds`, at most 1. It is the
    larger of the fraction of max_steps and the fraction of the seconds in which training must end."""
    done = step / config.max_steps
    if config.cap is not None:
        done = max(done, seconds / config.cap)
    return min(done, 1.0)


def lr_multiplier(step: int, seconds: float, config: ScheduleConfig) -> float:
    """Factor on every base learning rate for the step after `step` completed steps.

    `seconds` is training time so far. kind="warmdown_steps" is the published rule: the warmdown takes warmdown_steps
    times the mean step time so far, so slow first steps lower the rate. kind="warmdown_frac" decays over the last
    fraction of the budget (`budget_used`).
    """
    if config.kind == "warmdown_frac":
        left, length = 1.0 - budget_used(step, seconds, config), config.warmdown_frac
    elif config.warmdown_steps == 0:
        return 1.0
    elif config.cap is None:
        left, length = max(config.max_steps - step, 0), config.warmdown_steps
    else:
        left = max(config.cap - seconds, 0.0)
        length = config.warmdown_steps * seconds / max(step, 1)
        if config.warmdown_max_frac is not None:
            length = min(length, config.warmdown_max_frac * config.cap)
    if left > length or length <= 0:
        return 1.0
    part = left / length
    return max(part if config.warmdown_shape == "linear" else 0.5 * (1 - math.cos(math.pi * part)), config.min_lr)


def quantization_aware(used: float, multiplier: float, config: QuantConfig) -> bool:
    """Whether to fake-quantize a step that starts after the fraction `used` of the budget, with this learning-rate
    multiplier."""
    return config.qat != "off" and used >= config.qat_start and multiplier <= config.qat_below_lr


def muon_momentum(step: int, config: OptimConfig) -> float:
    """Muon's momentum for the step after `step` completed steps: it rises linearly, then stays constant."""
    if config.muon_momentum_warmup_steps == 0:
        return config.muon_momentum
    frac = min(step / config.muon_momentum_warmup_steps, 1.0)
    return (1 - frac) * config.muon_momentum_warmup_start + frac * config.muon_momentum


def weight_decay_factor(used: float, config: OptimConfig) -> float:
    """Factor on Muon's weight decay of a step that starts after the fraction `used` of the budget."""
    over = max(used - config.weight_decay_taper, 0.0) / (1 - config.weight_decay_taper)
    return 1 - over * (1 - config.weight_decay_end)


def crosses_cap(begun: float, step_seconds: float, config: ScheduleConfig) -> bool:
    """Whether the step after the one that began at `begun` seconds could end after the cap.

    `step_seconds` is what a step is given (`Pace.allowance`). Each of the two steps may take 5 % longer.
    """
    return config.cap is not None and begun + 2.1 * step_seconds > config.cap
