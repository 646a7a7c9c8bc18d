"""The live line of a run, for the process that trains it and for those that watch it. No torch."""

from __future__ import annotations

from typing import Any

from golfgpt.config import RunConfig


def seconds_left(config: RunConfig, step: int, seconds: float, mean: float) -> float:
    """Until training ends: by its steps or its clock, whichever is first, if steps go on to take `mean` seconds."""
    left = (config.schedule.max_steps - step) * mean
    if config.schedule.cap is not None:
        left = min(left, config.schedule.cap - seconds)
    return max(left, 0.0)


def status(config: RunConfig, row: dict[str, Any], mean: float) -> str:
    """`last_status`, with the time that is left."""
    left = seconds_left(config, row["step"], row["train_seconds"], mean)
    return f"{last_status(config, row, mean)}  {left:.0f} s left"


def last_status(config: RunConfig, row: dict[str, Any], mean: float) -> str:
    """After the step of `row`, an object of kind train in metrics.jsonl. Loss (nats per token) and bits per byte are
    running means, `mean` is the mean duration of recent steps in seconds."""
    bpb = row["bpb_ema"]
    return (
        f"step {row['step']}  mean loss {row['loss_ema']:.4f}  {f'{bpb:.4f} bits/byte  ' if bpb else ''}"
        f"rate {row['lr_multiplier']:.3f}  gradient {row['grad_norm']:.2f}  {mean * 1000:.1f} ms/step  "
        f"{config.data.batch_tokens / mean:,.0f} tokens/s"
    )
