"""Value embedding: what a token is, added to its values in some layers.

    v of layer l += value_scale * value_layer_scales[l] * value_table[id] value_projᵀ

One table and one projection for all layers (modded-nanogpt; records of 2026-03-22 and 2026-03-25).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from golfgpt.config import ModelConfig


def value_embeddings(
    ids: Tensor, weights: Mapping[str, Tensor], dtype: torch.dtype, config: ModelConfig
) -> dict[int, Tensor]:
    """Layer -> (B, T, kv_dim) in `dtype`, of those that add it to their values; ids (B, T)."""
    layers = config.value_embedding.layers
    if not layers:
        return {}
    shared = F.linear(F.embedding(ids, weights["value_table"]).to(dtype), weights["value_proj"].to(dtype))
    shared = shared * weights["value_scale"].to(dtype)
    return {layer: shared * scale.to(dtype) for layer, scale in zip(layers, weights["value_layer_scales"], strict=True)}
