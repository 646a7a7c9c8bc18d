"""What the layers of a forward do, in order, as data that can be printed. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from golfgpt.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One pass through a layer."""

    row: int
    """Its weights: the row of every bank."""
    skip_source: int | None = None
    """Index in the plan of the layer whose output is added first, times a row of skip_weights."""
    skip_row: int | None = None
    """That row of skip_weights."""

    def __str__(self) -> str:
        skip = "" if self.skip_source is None else f" + skip_weights[{self.skip_row}] * output of {self.skip_source}"
        return f"row {self.row}{skip}"


def layer_plan(config: ModelConfig) -> tuple[LayerPlan, ...]:
    """A U-Net: the outputs of the first half of the layers are added before those of the second, the last one first."""
    half = config.num_encoder_layers
    plan = []
    for i in range(config.num_layers):
        decoder = i - half
        if 0 <= decoder < config.num_skips:
            plan.append(LayerPlan(row=i, skip_source=half - 1 - decoder, skip_row=decoder))
        else:
            plan.append(LayerPlan(row=i))
    return tuple(plan)
