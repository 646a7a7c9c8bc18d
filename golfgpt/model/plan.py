"""The sequence of layers in a forward, as data that can be printed. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from golfgpt.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer in the sequence."""

    row: int
    """Row of every bank that holds the weights of the layer."""
    skip_source: int | None = None
    """Index in the plan of an earlier layer. Its output, times a row of skip_weights, is added to the input."""
    skip_row: int | None = None
    """Row of skip_weights that multiplies the output."""

    def __str__(self) -> str:
        skip = "" if self.skip_source is None else f" + skip_weights[{self.skip_row}] * output of {self.skip_source}"
        return f"row {self.row}{skip}"


def layer_plan(config: ModelConfig) -> tuple[LayerPlan, ...]:
    """A U-Net: the outputs of the first half of the layers are added to the inputs of the second half, in reverse
    order."""
    half = config.num_encoder_layers
    plan = []
    for i in range(config.num_layers):
        decoder = i - half
        if 0 <= decoder < config.num_skips:
            plan.append(LayerPlan(row=i, skip_source=half - 1 - decoder, skip_row=decoder))
        else:
            plan.append(LayerPlan(row=i))
    return tuple(plan)
