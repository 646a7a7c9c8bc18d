"""The sequence of layers in a forward, as data that can be printed. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golfgpt.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer in the sequence."""

    row: int
    """Row of every bank that holds the weights of the layer."""
    skip_source: int | None = None
    """Index in the plan of an earlier layer, whose output is mixed into the input."""
    skip_row: int | None = None
    """Row of skip_weights (and skip_gates) of that."""
    input_scale: float = 1.0
    """Factor of the normalized inputs of attention and MLP."""
    xsa: bool = False
    """Whether its attention is exclusive."""
    residual: Literal["sequential", "one_lane", "merged", "routed"] = "sequential"
    """How attention and MLP read and write the residual stream (golfgpt.model.layers)."""

    def __str__(self) -> str:
        skip = "" if self.skip_source is None else f" + skip_weights[{self.skip_row}] * output of {self.skip_source}"
        scale = "" if self.input_scale == 1 else f", inputs * {self.input_scale:.3f}"
        residual = "" if self.residual == "sequential" else f", {self.residual}"
        return f"row {self.row}{skip}{scale}{', xsa' if self.xsa else ''}{residual}"


def layer_plan(config: ModelConfig, looping: bool = True) -> tuple[LayerPlan, ...]:
    """A U-Net: the outputs of the first half of the layers are mixed into the inputs of the second half, in reverse
    order. `looping`: with all passes of model.loop. A layer that runs again keeps its weights and its scale."""
    order = config.layer_order(looping)
    half, parallel, plan = len(order) // 2, config.parallel, []
    for i, row in enumerate(order):
        skips = 0 <= i - half < half
        plan.append(
            LayerPlan(
                row=row,
                skip_source=2 * half - 1 - i if skips else None,
                skip_row=i - half if skips else None,
                input_scale=(row + 1) ** -0.5 if config.ln_scale else 1.0,
                xsa=row in config.xsa_layers,
                residual=parallel.kind if parallel.kind != "off" and row >= parallel.first else "sequential",
            )
        )
    return tuple(plan)
