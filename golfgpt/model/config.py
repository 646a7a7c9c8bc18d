"""Config of the model: its shape and its initial weights. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from golfgpt.fields import Count, CountOrZero, FractionBelowOne, Limit, NotNegative, Positive, Section


@dataclass(frozen=True, kw_only=True)
class BigramConfig(Section):
    """BigramHash: an embedding of hashed token pairs (golfgpt.model.bigram_hash has the equations)."""

    SECTION = "model.bigram"

    rows: CountOrZero = 0
    """Rows of the pair table; 0: no BigramHash. Recipe int5-int6-swa has 10240, the last for tokens without a
    predecessor."""
    dim: CountOrZero = 0
    """Columns of the pair table, which are projected to model_dim. Recipe int5-int6-swa has 128."""
    hash: Literal["xor", "linear"] = "xor"
    """xor: as in recipe int5-int6-swa, with a learned scale; linear: as in parameter-golf PR #65, without
    one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rows, self.dim) != (0, 0) and (self.rows < 2 or self.dim < 1):
            raise ValueError(
                f"model.bigram.rows is {self.rows} and model.bigram.dim is {self.dim}; expected at least 2 rows and "
                "1 column, or 0 of both"
            )


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Section):
    """Depth recurrence: the layers first to last run `passes` times in a row, with the same weights."""

    SECTION = "model.loop"

    first: CountOrZero = 0
    last: CountOrZero = 0
    """Both belong to the loop."""
    passes: Count = 1
    """1: no loop. Published scripts count one less (NUM_LOOPS=2 are three passes)."""
    start: FractionBelowOne = 0.0
    """Fraction of the training budget at which the further passes begin. Scoring always has them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first > self.last:
            raise ValueError(f"model.loop.first is {self.first}; expected at most model.loop.last, {self.last}")
        if self.passes == 1 and (self.first, self.last, self.start) != (0, 0, 0.0):
            raise ValueError(
                "model.loop names layers or a start, but model.loop.passes is 1; expected 2 or more passes"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """Layers whose attention and MLP run side by side (golfgpt.model.layers has the equations)."""

    SECTION = "model.parallel"

    kind: Literal["off", "one_lane", "merged", "routed"] = "off"
    """one_lane: both read the stream and add to it (2026-04-09). merged: attention has a lane of its own, the MLP
    another, and a learned scalar merges them at the end (parameter-golf PR #1477). routed: two lanes, and learned
    weights route both results into both (2026-04-10)."""
    first: CountOrZero = 0
    """The first such layer; all later ones are, too."""
    final: Literal["mean", "mlp", "attention"] = "mean"
    """What routed lanes end as: their mean, or one of them."""


@dataclass(frozen=True, kw_only=True)
class ValueEmbeddingConfig(Section):
    """An embedding of the token that is added to the values of some layers (golfgpt.model.value_embedding)."""

    SECTION = "model.value_embedding"

    dim: CountOrZero = 0
    """Columns of the table, which are projected to the values; 0: none. Published ones have 128."""
    layers: tuple[int, ...] = ()
    """Layers that add it to their values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.dim) != bool(self.layers):
            raise ValueError(
                f"model.value_embedding.dim is {self.dim} and model.value_embedding.layers is {self.layers}; expected "
                "both or neither"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A GPT with grouped-query attention, relu^2 MLP, U-Net skips and a softcapped head. The defaults are those of
    recipe baseline. SmearGate and BigramHash mix the previous token into each embedding; golfgpt.model.smear_gate and
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
    """Initial c_q, c_k, c_v and mlp_fc: U(±1/sqrt(fan_in)), or orthogonal if both dimensions are at least 64."""
    projection_init: Literal["by_depth", "unscaled"] = "by_depth"
    """Whether the initial projections of pair table and value embedding are multiplied by 1/sqrt(2 num_layers), which
    2026-03-25 does not."""
    resid_mix_init: Literal["identity", "phase"] = "identity"
    """Initial (x, x0) weights of each block. identity: (1, 0); phase: (p, 1 - p), with p rising from 0.18 to 0.82 over
    depth (recipe int5-int6-swa)."""
    smear_gate: Literal["none", "after_norm", "before_norm", "input"] = "none"
    """Mix each embedding with the previous one. after_norm: after the norm of the embedding; before_norm: before it
    (parameter-golf PR #65); input: before it, with a gate that is computed from the embedding (2026-04-27)."""
    bigram: BigramConfig = BigramConfig()
    mlp_slope: NotNegative = 0.0
    """The activation is leaky_relu(x, mlp_slope)^2. 0: relu^2; records from 2026-03-25 on have 0.5."""
    xsa_layers: tuple[int, ...] = ()
    """Layers with exclusive self-attention (golfgpt.model.attention_output): the result has no component along the
    token's own value."""
    rope_dims: CountOrZero = 0
    """How many channels of a head turn, an even number; 0: all. Records from 2026-03-21 on turn 16 of 64."""
    ln_scale: bool = False
    """Whether layer i multiplies its normalized inputs by 1 / sqrt(i + 1)."""
    attn_gate: Literal["none", "window", "dense", "sparse"] = "none"
    """A gate for each head of the attention's result, computed from the attention's input u. window: 2 sigmoid(W u) of
    the first gate_window channels of u (2026-04-16); dense: sigmoid(W u) of all channels (2026-04-19); sparse:
    sigmoid(attn_gate_scale W u) of the first gate_window channels (2026-04-23)."""
    attn_gate_scale: Positive = 1.0
    gate_window: Count = 12
    """Channels that the gates "window" and "sparse" and the smear gate "input" read."""
    loop: LoopConfig = LoopConfig()
    skip_gates: bool = False
    """Whether a skip is a gated mean, g x + (1 - g) skip_weights * skipped, instead of a sum."""
    parallel: ParallelConfig = ParallelConfig()
    value_embedding: ValueEmbeddingConfig = ValueEmbeddingConfig()
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
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            raise ValueError(
                f"model.rope_dims is {self.rope_dims}; expected an even number up to head_dim, {self.head_dim}"
            )
        if self.rope_reference_len is not None and self.rotated_dims == 2:
            raise ValueError(
                "model.rope_reference_len needs more than 2 turning channels, got 2, because the base grows by "
                "length^(r / (r - 2)) with r of them; raise head_dim or rope_dims, or drop rope_reference_len"
            )
        for name, layers in (
            ("xsa_layers", self.xsa_layers),
            ("value_embedding.layers", self.value_embedding.layers),
            ("loop.last", (self.loop.last,) if self.loop.passes > 1 else ()),
            ("parallel.first", (self.parallel.first,) if self.parallel.kind != "off" else ()),
        ):
            if any(not 0 <= i < self.num_layers for i in layers) or len(set(layers)) < len(layers):
                shown = layers if name.endswith("layers") else layers[0]
                raise ValueError(f"model.{name} is {shown}; expected different layers from 0 to {self.num_layers - 1}")
        if (
            self.parallel.kind in ("merged", "routed")
            and self.loop.passes > 1
            and self.parallel.first <= self.loop.last
        ):
            raise ValueError(
                f"model.parallel.first is {self.parallel.first}; expected a layer after model.loop.last, "
                f"{self.loop.last}, because a second lane does not end before the last layer"
            )
        if self.gate_window > self.model_dim and self.reads_window:
            raise ValueError(
                f"model.gate_window is {self.gate_window}; expected at most model.model_dim, {self.model_dim}"
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

    @property
    def reads_window(self) -> bool:
        """Whether some gate reads the first gate_window channels."""
        return self.attn_gate in ("window", "sparse") or self.smear_gate == "input"

    @property
    def rotated_dims(self) -> int:
        """Channels of a head that turn."""
        return self.rope_dims or self.head_dim

    def rope_base_at(self, length: int) -> float:
        """Rotary base for sequences of `length` tokens. Beyond the reference length, the base is multiplied by
        (length / reference)^(r / (r - 2)) with r turning channels. The slowest angle then covers the same range as at
        the reference length, and the fastest angle is unchanged."""
        if self.rope_reference_len is None or length <= self.rope_reference_len:
            return self.rope_base
        return self.rope_base * (length / self.rope_reference_len) ** (self.rotated_dims / (self.rotated_dims - 2))

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    def layer_order(self, looping: bool = True) -> list[int]:
        """The layers in the order in which a forward runs them; `looping`: with all passes of the loop."""
        order, loop = list(range(self.num_layers)), self.loop
        if not looping or loop.passes == 1:
            return order
        return order[: loop.first] + order[loop.first : loop.last + 1] * loop.passes + order[loop.last + 1 :]

    @property
    def num_skips(self) -> int:
        """Skips of a forward with all passes: from each layer of the first half."""
        return (self.num_layers + (self.loop.passes - 1) * (self.loop.last + 1 - self.loop.first)) // 2
