"""Config of the model: its shape and its initial weights. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from golfgpt.fields import Count, CountOrZero, Limit, NotNegative, Positive, Section


@dataclass(frozen=True, kw_only=True)
class BigramConfig(Section):
    """BigramHash: an embedding of hashed token pairs (golfgpt.model.bigram_hash has the equations)."""

    SECTION = "model.bigram"

    rows: CountOrZero = 0
    """Rows of the pair table; 0: no BigramHash. R5 has 10240, the last for tokens without a predecessor."""
    dim: CountOrZero = 0
    """Columns of the pair table, which are projected to model_dim. R5 has 128."""
    hash: Literal["xor", "linear"] = "xor"
    """xor: as in R5, with a learned scale; linear: as in PR #65, without one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rows, self.dim) != (0, 0) and (self.rows < 2 or self.dim < 1):
            raise ValueError(
                f"model.bigram.rows is {self.rows} and model.bigram.dim is {self.dim}; expected at least 2 rows and "
                "1 column, or 0 of both"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A GPT with grouped-query attention, relu^2 MLP, U-Net skips and a softcapped head. The defaults are those
    of recipe R0. SmearGate and BigramHash mix the previous token into each embedding; golfgpt.model.smear_gate and
    golfgpt.model.bigram_hash have the equations."""

    vocab_size: Annotated[Count, Limit("<=", 65_536)] = 1024
    """Tokens in the vocabulary; must equal the vocabulary size of the tokenizer."""
    num_layers: Count = 9
    """Transformer blocks; learned skip connections lead from the first half to the second."""
    model_dim: Count = 512
    """Width of the residual stream."""
    num_heads: Count = 8
    """Query heads; head_dim = model_dim / num_heads."""
    num_kv_heads: Count = 4
    """Key and value heads; must divide num_heads."""
    mlp_hidden: Count = 1024
    """Hidden units of each MLP."""
    tie_embeddings: bool = True
    """Whether the token embedding is also the output head."""
    logit_softcap: Positive = 30.0
    """Logits are softcap * tanh(logits / softcap)."""
    rope_base: Positive = 10_000.0
    """Base of the rotary frequencies."""
    qk_gain_init: NotNegative = 1.5
    """Initial per-head gain on normalized, rotated queries."""
    tied_embed_init_std: NotNegative = 0.005
    """Standard deviation of the initial embedding if it is tied."""
    rope_reference_len: Count | None = None
    """Sequences longer than this many tokens use a larger rotary base (NTK-aware scaling); None: never."""
    matrix_init: Literal["uniform", "orthogonal"] = "uniform"
    """Initial c_q, c_k, c_v and mlp_fc: U(±1/sqrt(fan_in)), or orthogonal if both dimensions are at least 64 (R5)."""
    resid_mix_init: Literal["identity", "phase"] = "identity"
    """Initial (x, x0) weights of each block. identity: (1, 0); phase: (p, 1 - p), with p rising from 0.18 to 0.82 over
    depth (R5)."""
    smear_gate: Literal["none", "after_norm", "before_norm"] = "none"
    """Mix each embedding with the previous one. after_norm: after the norm of the embedding (R5); before_norm: before
    it (PR #65)."""
    bigram: BigramConfig = BigramConfig()
    document_start: int | None = None
    """Token id that starts a document (BOS, 1 in published and prepared data). SmearGate and BigramHash treat it as the
    first token of a sequence. None, as published: they mix in the last token of the previous document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_dim % self.num_heads:
            raise ValueError(
                f"model.model_dim {self.model_dim} is not a multiple of model.num_heads {self.num_heads}; change one "
                "of the two"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}; "
                "change one of the two"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} must be even, because rotary embedding rotates pairs; head_dim is "
                "model.model_dim / model.num_heads: change one of the two"
            )
        if self.rope_reference_len is not None and self.head_dim == 2:
            raise ValueError(
                "model.rope_reference_len needs head_dim > 2, got 2, because the base grows by length^(h / (h - 2)) "
                "with h = head_dim; raise model.model_dim or drop rope_reference_len"
            )
        if self.document_start is None:
            return
        if not 0 <= self.document_start < self.vocab_size:
            raise ValueError(
                f"model.document_start is {self.document_start}; expected a token id below {self.vocab_size}"
            )
        if not self.mixes_tokens:
            raise ValueError(
                f"model.document_start {self.document_start} changes nothing without model.smear_gate or "
                "model.bigram.rows; set one of them or drop document_start"
            )

    @property
    def mixes_tokens(self) -> bool:
        """Whether the previous token is mixed into an embedding."""
        return self.smear_gate != "none" or self.bigram.rows > 0

    def rope_base_at(self, length: int) -> float:
        """Rotary base for sequences of `length` tokens. Beyond the reference length, the base is multiplied by
        (length / reference)^(h / (h - 2)) with h = head_dim. The slowest angle then covers the same range as at the
        reference length, and the fastest angle is unchanged."""
        if self.rope_reference_len is None or length <= self.rope_reference_len:
            return self.rope_base
        return self.rope_base * (length / self.rope_reference_len) ** (self.head_dim / (self.head_dim - 2))

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_encoder_layers(self) -> int:
        return self.num_layers // 2

    @property
    def num_skips(self) -> int:
        return min(self.num_encoder_layers, self.num_layers - self.num_encoder_layers)
