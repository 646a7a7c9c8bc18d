"""Sampling token by token, with a cache of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from golfgpt.model.kv_cache import KVCache

if TYPE_CHECKING:
    from golfgpt.model.gpt import GPT


@torch.inference_mode()
def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    window: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Sample a continuation of ids (T,). Each new token attends to the last `window` tokens.

    With temperature 0, the most likely token is chosen. Otherwise it is drawn from the `top_k` most likely ones (0:
    from all), and of these from the fewest whose probabilities sum to `top_p`. Generation stops early at `stop_id`.
    Returns only the new ids.
    """
    cache, out = KVCache(window), []
    hidden = model(ids[None, -window:], cache=cache)
    for _ in range(max_new_tokens):
        logits = model.logits(hidden[0, -1])
        token = _draw(logits, temperature, top_k, top_p, generator) if temperature else int(logits.argmax())
        if token == stop_id:
            break
        out.append(token)
        hidden = model(torch.tensor([[token]], device=ids.device), cache=cache)
    return out


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> int:
    """One of the most likely tokens, as their `logits` (V,) have it."""
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))  # the most likely first
    chances = ((values - values[0]) / max(temperature, 1e-30)).softmax(0)  # 1 / 1e-40 is infinite in float32
    if top_p < 1:
        chances[chances.cumsum(0) - chances >= top_p] = 0  # what comes before them has top_p already
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


@torch.inference_mode()
def sample(
    model: GPT, first: Tensor, length: int, *, temperature: float, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Sequences (B, length) that begin with first (B, 1), computed in `dtype`; `length` is also the window."""
    cache, weights, ids = KVCache(length), model.weights(dtype), [first]
    for _ in range(length - 1):
        hidden = model(ids[-1], dtype=dtype, weights=weights, cache=cache)
        chances = (model.logits(hidden[:, -1]) / temperature).softmax(-1)
        ids.append(torch.multinomial(chances, 1, generator=generator))
    return torch.cat(ids, dim=1)
