"""Sampling: token by token, with a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from golfgpt.model.gpt import GPT


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


@torch.inference_mode()
def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    window: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Sample a continuation of ids (T,) token by token, each seeing the last `window` tokens.

    temperature 0 takes the likeliest token. Stops early at `stop_id`. Returns the new ids only.
    """
    cache, out = KVCache(window), []
    hidden = model(ids[None, -window:], cache=cache)
    for _ in range(max_new_tokens):
        logits = model.logits(hidden[0, -1])
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if top_k is not None and top_k < logits.numel():
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial(((logits - logits.max()) / temperature).softmax(0), 1, generator=generator))
        if token == stop_id:
            break
        out.append(token)
        hidden = model(torch.tensor([[token]], device=ids.device), cache=cache)
    return out
