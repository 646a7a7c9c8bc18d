"""State of earlier tokens for generation, so that each step computes only one token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the last `window` tokens for each layer of the plan, and the state of the last token that the
    embedding of the next token mixes in. Rotary embedding is relative. A model trained on sequences of `window` tokens
    therefore never meets a distance that it has not seen in training, even if the text is longer."""

    window: int
    seen: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    """Of the last token: its id "ids" (B, 1), and its embedding "x" (B, 1, D) before the smear gate."""

    def extend(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, h) of a layer. Returns all keys and values that its queries may attend to."""
        if index in self.layers:
            old_k, old_v = self.layers[index]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.layers[index] = k[:, :, -self.window :], v[:, :, -self.window :]
        return self.layers[index]
