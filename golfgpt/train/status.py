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


def status(config: RunConfig, row: dict[str, Any], mean: float, *, ended: bool = False) -> str:
    """After the step of `row`, an object of kind train in metrics.jsonl. Loss (nats per token) and bits per byte are
    running means, `mean` is the mean duration of recent steps in seconds. What is asked for most comes first, because a
    terminal cuts the line. The time left is for a run that has not `ended`."""
    step, bpb = row["step"], row["bpb_ema"]
    left = "" if ended else f"{seconds_left(config, step, row['train_seconds'], mean):.0f} s left  "
    return (
        f"step {step}  {left}mean loss {row['loss_ema']:.4f}  {f'{bpb:.4f} bits/byte  ' if bpb else ''}"
        f"{mean * 1000:.1f} ms/step  rate {row['lr_multiplier']:.3f}  gradient {row['grad_norm']:.2f}  "
        f"{config.data.batch_tokens / mean:,.0f} tokens/s"
    )
