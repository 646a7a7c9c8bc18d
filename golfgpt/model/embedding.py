"""From token ids to x0, the input of the first layer: the normalized embedding, mixed with the previous token.

    x = tok_emb[ids] + pair_embedding (bigram_hash);   x0 = smear(norm(x)) or norm(x), depending on smear_gate

The first token of a sequence has no previous token. With model.document_start, the same holds for the first token of
each document.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from golfgpt.config import ModelConfig
from golfgpt.model.bigram_hash import pair_embedding
from golfgpt.model.linear import rms_norm
from golfgpt.model.smear_gate import smear


def one_later(x: Tensor, before: Tensor | None, fill: int) -> Tensor:
    """x (B, T, ...) shifted later by one token. The first position holds `before` (B, 1, ...), or `fill` if it is
    None."""
    return torch.cat((torch.full_like(x[:, :1], fill) if before is None else before, x[:, :-1]), dim=1)


def embed(
    ids: Tensor, weights: Mapping[str, Tensor], dtype: torch.dtype, config: ModelConfig, last: dict[str, Tensor]
) -> Tensor:
    """x0 (B, T, D) of ids (B, T). `last` is the `last` of a KVCache, empty at the start of a sequence; it is updated in
    place."""
    x = F.embedding(ids, weights["tok_emb"]).to(dtype)
    prev = one_later(ids, last.get("ids"), -1)
    if config.document_start is not None:
        prev = prev.masked_fill(ids == config.document_start, -1)
    last["ids"] = ids[:, -1:]
    if config.bigram.rows:
        x = x + pair_embedding(ids, prev, weights, dtype, config)
    if config.smear_gate in ("none", "after_norm"):
        x = rms_norm(x)
    if config.smear_gate == "none":
        return x
    before = one_later(x, last.get("x"), 0) * (prev >= 0)[..., None]
    last["x"] = x[:, -1:]
    return smear(config.smear_gate, x, before, weights)
