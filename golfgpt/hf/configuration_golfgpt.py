"""Configuration of a golfgpt model for transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from golfgpt.files import from_json
from golfgpt.model.config import ModelConfig


class GolfGPTConfig(PretrainedConfig):
    """`golf` holds all fields of golfgpt's ModelConfig; they are read strictly."""

    model_type = "golfgpt"

    def __init__(self, *, golf: dict[str, Any] | None = None, max_position_embeddings: int = 1024, **kwargs: Any):
        """`max_position_embeddings`: tokens per training sequence. Generation attends to as many."""
        self.golf = dataclasses.asdict(ModelConfig()) if golf is None else golf
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)

    @property
    def golf_config(self) -> ModelConfig:
        return from_json(ModelConfig, self.golf)

    @property
    def vocab_size(self) -> int:
        return self.golf["vocab_size"]

    @property
    def hidden_size(self) -> int:
        return self.golf["model_dim"]

    @property
    def num_hidden_layers(self) -> int:
        return self.golf["num_layers"]

    @property
    def num_attention_heads(self) -> int:
        return self.golf["num_heads"]
