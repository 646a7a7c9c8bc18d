"""What generation keeps of earlier tokens, so that each step computes one token only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the last `window` tokens per layer of the plan, and what the next token's embedding mixes in.
    Rotary embedding is relative, so a model trained on sequences of `window` tokens never meets a distance it has not
    seen, however long the text grows."""

    window: int
    seen: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    """The last token's "ids" (B, 1), and its embedding "x" (B, 1, D) before the smear gate."""

    def extend(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, h) of a layer and return all that its queries may see."""
        if index in self.layers:
            old_k, old_v = self.layers[index]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.layers[index] = k[:, :, -self.window :], v[:, :, -self.window :]
        return self.layers[index]
