"""BigramHash: an embedding of each pair (previous token, token). A hash of the pair selects a row of a table.

"xor"      bigram_scale * table[(36313 id ^ 27191 prev) mod (rows - 1)] projᵀ;  without prev: row rows - 1   (R5)
"linear"   table[(92821 prev + id) mod rows] projᵀ;                             without prev: prev = 0       (PR #65)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from golfgpt.config import ModelConfig


def pair_rows(ids: Tensor, prev: Tensor, config: ModelConfig) -> Tensor:
    """Rows of the pair table for token ids (B, T) with previous tokens prev (B, T), where -1 means no previous
    token."""
    rows = config.bigram.rows
    if config.bigram.hash == "xor":
        return torch.where(prev < 0, rows - 1, ((36313 * ids) ^ (27191 * prev)) % (rows - 1))
    return (92821 * prev.clamp(min=0) + ids) % rows


def pair_embedding(
    ids: Tensor, prev: Tensor, weights: Mapping[str, Tensor], dtype: torch.dtype, config: ModelConfig
) -> Tensor:
    """Embedding of the pairs, (B, T, D) in `dtype`, to be added to the token embedding."""
    pairs = F.embedding(pair_rows(ids, prev, config), weights["bigram_table"]).to(dtype)
    pairs = F.linear(pairs, weights["bigram_proj"].to(dtype))
    return pairs * weights["bigram_scale"].to(dtype) if config.bigram.hash == "xor" else pairs
