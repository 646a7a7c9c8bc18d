"""The shape of the model and how it starts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from golfgpt.fields import Count, Limit, NotNegative, Positive, Section


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A GPT with grouped-query attention, relu^2 MLP, U-Net skips and a softcapped head. The defaults are recipe R0;
    SmearGate and BigramHash mix the previous token into each embedding (`golfgpt.model.smear_gate` and
    `bigram_hash` have the equations)."""

    vocab_size: Annotated[Count, Limit("<=", 65_536)] = 1024
    """Tokens in the vocabulary; must equal the tokenizer's."""
    num_layers: Count = 9
    """Transformer blocks; the first half feeds the second half through learned skips."""
    model_dim: Count = 512
    """Width of the residual stream."""
    num_heads: Count = 8
    """Query heads; head_dim = model_dim / num_heads."""
    num_kv_heads: Count = 4
    """Key and value heads; divides num_heads."""
    mlp_hidden: Count = 1024
    """Hidden units of each MLP."""
    tie_embeddings: bool = True
    """Whether the token embedding is the output head."""
    logit_softcap: Positive = 30.0
    """Logits are softcap * tanh(logits / softcap)."""
    rope_base: Positive = 10_000.0
    """Base of the rotary frequencies."""
    qk_gain_init: NotNegative = 1.5
    """Initial per-head gain on normalized, rotated queries."""
    tied_embed_init_std: NotNegative = 0.005
    """Standard deviation of the initial embedding when it is tied."""
    rope_reference_len: Count | None = None
    """Sequences longer than this get a larger rotary base (NTK-aware scaling, see `rope_base_at`); None: never."""
    matrix_init: Literal["uniform", "orthogonal"] = "uniform"
    """Initial c_q, c_k, c_v and mlp_fc: U(±1/sqrt(fan_in)), or orthogonal where both sides are at least 64 (R5)."""
    resid_mix_init: Literal["identity", "phase"] = "identity"
    """Initial (x, x0) weights of each block: (1, 0), or (p, 1 - p) with p rising from 0.18 to 0.82 over depth (R5)."""
    smear_gate: Literal["none", "after_norm", "before_norm"] = "none"
    """Blend of each embedding with the one before it, after the embedding's norm (R5) or before it (PR #65)."""
    bigram_hash: Literal["none", "xor", "linear"] = "none"
    """Embedding of token pairs through a hash: R5's, with a learned scale, or PR #65's, without."""
    bigram_vocab_size: int = 0
    """Rows of the pair table; R5 has 10240, the last for tokens without a predecessor."""
    bigram_dim: int = 0
    """Columns of the pair table, projected to model_dim; R5 has 128."""
    document_start: int | None = None
    """Token id that opens a document (BOS, 1 in published and prepared data): SmearGate and BigramHash treat it as
    the first of a sequence. None, as published: they mix in the last token of the document before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_dim % self.num_heads:
            raise ValueError(f"model.model_dim {self.model_dim} is not a multiple of model.num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embedding turns pairs")
        if self.rope_reference_len is not None and self.head_dim == 2:
            raise ValueError("model.rope_reference_len needs head_dim > 2: the base grows by length^(h / (h - 2))")
        rows, columns = self.bigram_vocab_size, self.bigram_dim
        if self.bigram_hash == "none" and (rows or columns):
            raise ValueError(
                f"model.bigram_vocab_size {rows} and model.bigram_dim {columns} need a model.bigram_hash, got none"
            )
        if self.bigram_hash != "none" and (rows < 2 or columns < 1):
            raise ValueError(
                f"model.bigram_hash {self.bigram_hash} needs a model.bigram_vocab_size of at least 2 and a "
                f"model.bigram_dim of at least 1, got {rows} and {columns}"
            )
        if self.document_start is None:
            return
        if not 0 <= self.document_start < self.vocab_size:
            raise ValueError(
                f"model.document_start is {self.document_start}; expected a token id below {self.vocab_size}"
            )
        if self.smear_gate == self.bigram_hash == "none":
            raise ValueError(
                f"model.document_start {self.document_start} changes nothing without model.smear_gate or "
                "model.bigram_hash"
            )

    def rope_base_at(self, length: int) -> float:
        """Rotary base for sequences of `length` tokens: base (length / reference)^(h / (h - 2)) beyond the reference
        length, h = head_dim. The slowest angle then spans what it spanned there, the fastest one is unchanged."""
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
