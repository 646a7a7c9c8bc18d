"""The live line of a run, for the process that trains it and for those that watch it. No torch."""

from __future__ import annotations

from golfgpt.config import RunConfig


def seconds_left(config: RunConfig, step: int, seconds: float, mean: float) -> float:
    """Until training ends: by its steps or its clock, whichever is first, if steps go on to take `mean` seconds."""
    left = (config.schedule.max_steps - step) * mean
    if config.schedule.cap is not None:
        left = min(left, config.schedule.cap - seconds)
    return max(left, 0.0)


def status(config: RunConfig, step: int, loss: float, bpb: float | None, seconds: float, mean: float) -> str:
    """After `step` steps, at `seconds` of the training clock. `loss` (nats per token) and `bpb` are running means,
    `mean` is the mean duration of recent steps in seconds."""
    return (
        f"step {step}  loss {loss:.4f}  {f'{bpb:.4f} bits/byte  ' if bpb else ''}{mean * 1000:.1f} ms/step  "
        f"{config.data.batch_tokens / mean:,.0f} tokens/s  {seconds_left(config, step, seconds, mean):.0f} s left"
    )
