"""Configuration: frozen dataclasses with units, validated when built, stored as JSON, loaded strictly.

Standard library only, so that reading a config never waits for torch. A recipe is another recipe with
fields replaced (`golfgpt.recipes`); the command line overrides any field as `--section.field value`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Device = Literal["auto", "cpu", "cuda"]
Compressor = Literal["smallest", "zlib", "zstd", "lzma", "brotli"]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A GPT with grouped-query attention, relu^2 MLP, U-Net skips and a softcapped head. The defaults are recipe R0;
    SmearGate and BigramHash mix the previous token into each embedding (`golfgpt.model.smear_gate` and
    `bigram_hash` have the equations)."""

    vocab_size: int = 1024
    """Tokens in the vocabulary; must equal the tokenizer's."""
    num_layers: int = 9
    """Transformer blocks; the first half feeds the second half through learned skips."""
    model_dim: int = 512
    """Width of the residual stream."""
    num_heads: int = 8
    """Query heads; head_dim = model_dim / num_heads."""
    num_kv_heads: int = 4
    """Key and value heads; divides num_heads."""
    mlp_hidden: int = 1024
    """Hidden units of each MLP."""
    tie_embeddings: bool = True
    """Whether the token embedding is the output head."""
    logit_softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    qk_gain_init: float = 1.5
    """Initial per-head gain on normalized, rotated queries."""
    tied_embed_init_std: float = 0.005
    """Standard deviation of the initial embedding when it is tied."""
    rope_reference_len: int | None = None
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
        for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_hidden"):
            value = getattr(self, name)
            _check(value >= 1, f"model.{name} must be at least 1, got {value}")
        _check(self.vocab_size <= 65_536, f"model.vocab_size {self.vocab_size} exceeds 65536: tokens are uint16")
        _check(
            self.model_dim % self.num_heads == 0,
            f"model.model_dim {self.model_dim} is not a multiple of model.num_heads {self.num_heads}",
        )
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}",
        )
        _check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even: rotary embedding turns pairs")
        for name in ("logit_softcap", "rope_base"):
            value = getattr(self, name)
            _check(0 < value < math.inf, f"model.{name} must be positive and finite, got {value}")
        for name in ("qk_gain_init", "tied_embed_init_std"):
            value = getattr(self, name)
            _check(0 <= value < math.inf, f"model.{name} must be finite and not negative, got {value}")
        reference = self.rope_reference_len
        _check(
            reference is None or reference >= 1,
            f"model.rope_reference_len must be at least 1 or None, got {reference}",
        )
        _check(
            reference is None or self.head_dim > 2,
            f"model.rope_reference_len {reference} needs a head_dim above 2: the base grows by length^(h / (h - 2))",
        )
        rows, columns = self.bigram_vocab_size, self.bigram_dim
        if self.bigram_hash == "none":
            _check(
                rows == columns == 0,
                f"model.bigram_vocab_size {rows} and model.bigram_dim {columns} need a model.bigram_hash, got none",
            )
        else:
            _check(
                rows >= 2 and columns >= 1,
                f"model.bigram_hash {self.bigram_hash} needs a model.bigram_vocab_size of at least 2 and a "
                f"model.bigram_dim of at least 1, got {rows} and {columns}",
            )
        if self.document_start is not None:
            _check(
                0 <= self.document_start < self.vocab_size,
                f"model.document_start must be a token id below {self.vocab_size}, got {self.document_start}",
            )
            _check(
                self.smear_gate != "none" or self.bigram_hash != "none",
                f"model.document_start {self.document_start} changes nothing without model.smear_gate or "
                "model.bigram_hash",
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


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon for the matrices of the blocks, Adam for the embedding, the head and everything else."""

    matrix_lr: float = 0.04
    """Muon's base learning rate."""
    scalar_lr: float = 0.04
    """Adam's base learning rate for gains, scales and mixes."""
    tied_embed_lr: float = 0.05
    """Adam's base learning rate for a tied embedding."""
    embed_lr: float = 0.6
    """Adam's base learning rate for an untied embedding."""
    head_lr: float = 0.008
    """Adam's base learning rate for an untied head."""
    muon_momentum: float = 0.95
    """Muon's momentum after its warm-up."""
    muon_momentum_warmup_start: float = 0.85
    """Muon's momentum at step 0."""
    muon_momentum_warmup_steps: int = 500
    """Steps over which the momentum rises linearly; 0 starts at the final value."""
    muon_ns_steps: int = 5
    """Newton-Schulz iterations."""
    muon_row_norm: bool = False
    """Whether Muon divides the rows of what it orthogonalizes by their norms first (MuonEq-R)."""
    muon_variance_beta: float = 0.0
    """Decay of the running mean square of each row of Muon's update, by whose root it is divided (NorMuon); 0: off."""
    adam_beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    adam_beta2: float = 0.95
    """Adam's decay of the mean squared gradient."""
    adam_eps: float = 1e-8
    """Adam's addend to the root of the mean squared gradient."""
    weight_decay: float = 0.0
    """Decoupled weight decay of every group: w <- w (1 - lr * weight_decay) - update."""
    grad_clip_norm: float = 0.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    embed_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the token embedding and the pair table and of Adam's moments for them. bfloat16, as published, loses
    late updates that are smaller than its rounding."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, str):
                _check(0 <= value < math.inf, f"optim.{item.name} must be finite and not negative, got {value}")
        _check(self.muon_ns_steps >= 1, f"optim.muon_ns_steps must be at least 1, got {self.muon_ns_steps}")
        below_one = ("muon_momentum", "muon_momentum_warmup_start", "muon_variance_beta", "adam_beta1", "adam_beta2")
        for name in below_one:
            _check(getattr(self, name) < 1, f"optim.{name} must be below 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """When training stops and how the learning rate falls."""

    max_steps: int = 20_000
    """Optimizer steps at most."""
    max_seconds: float | None = 600.0
    """Training seconds at most (compilation, warm-up, checkpoints and evaluation are not counted); None: no cap."""
    kind: Literal["warmdown_steps", "warmdown_frac"] = "warmdown_frac"
    """warmdown_steps: upstream's rule, a number of steps turned into time by the mean step;
    warmdown_frac: the last fraction of the budget, whichever of steps and seconds is further along."""
    warmdown_steps: int = 1200
    """Length of the decay to zero for kind=warmdown_steps; 0 keeps the rate constant."""
    warmdown_frac: float = 0.4
    """Fraction of the budget spent decaying for kind=warmdown_frac, 0 to 1."""
    warmdown_shape: Literal["linear", "cosine"] = "linear"
    """Shape of the decay; cosine is half a period, from 1 to 0."""
    warmdown_max_frac: float | None = None
    """Longest decay as a fraction of max_seconds for kind=warmdown_steps; R5 has 0.5, which makes its recipe
    another one where steps are slow. None: no limit."""

    def __post_init__(self) -> None:
        _check(self.max_steps >= 1, f"schedule.max_steps must be at least 1, got {self.max_steps}")
        _check(
            self.max_seconds is None or 0 < self.max_seconds < math.inf,
            f"schedule.max_seconds must be positive or None, got {self.max_seconds}",
        )
        _check(
            self.warmdown_steps >= 0,
            f"schedule.warmdown_steps must not be negative, got {self.warmdown_steps}",
        )
        _check(
            0 <= self.warmdown_frac <= 1,
            f"schedule.warmdown_frac must lie in 0..1, got {self.warmdown_frac}",
        )
        _check(
            self.warmdown_max_frac is None or 0 < self.warmdown_max_frac <= 1,
            f"schedule.warmdown_max_frac must lie above 0 and up to 1, got {self.warmdown_max_frac}",
        )
        _check(
            self.warmdown_max_frac is None or (self.kind == "warmdown_steps" and self.max_seconds is not None),
            f"schedule.warmdown_max_frac {self.warmdown_max_frac} limits kind=warmdown_steps with max_seconds; got "
            f"kind {self.kind}, max_seconds {self.max_seconds}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens a step sees."""

    path: str | None = None
    """Folder made by `golfgpt data prepare` (or holding published *_train_*.bin and *_val_*.bin shards)."""
    batch_tokens: int = 524_288
    """Target tokens per optimizer step, over all ranks."""
    seq_len: int = 1024
    """Tokens per training sequence."""
    spans: int = 8
    """Contiguous spans that a step reads; they are dealt to the ranks, so at most this many ranks take part."""
    microbatch_tokens: int | None = None
    """Tokens per forward and backward; None: one span. Fewer need less memory, more (several spans at once) less
    launching; the step stays the same."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "seq_len", "spans"):
            _check(getattr(self, name) >= 1, f"data.{name} must be at least 1, got {getattr(self, name)}")
        unit = self.spans * self.seq_len
        _check(
            self.batch_tokens % unit == 0,
            f"data.batch_tokens {self.batch_tokens} is not a multiple of data.spans * data.seq_len = "
            f"{self.spans} * {self.seq_len} = {unit}",
        )
        micro = self.microbatch_tokens
        _check(
            micro is None or (micro >= self.seq_len and micro % self.seq_len == 0),
            f"data.microbatch_tokens {micro} is not a positive multiple of data.seq_len {self.seq_len}",
        )

    @property
    def span_tokens(self) -> int:
        return self.batch_tokens // self.spans

    @property
    def microbatch(self) -> int:
        """Tokens per forward and backward."""
        return self.microbatch_tokens or self.span_tokens


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Averaging of the weights over the last part of training; the average is what is exported."""

    kind: Literal["none", "swa", "ema"] = "none"
    """swa: the mean of every swa_every-th step's weights once the learning rate has fallen below swa_start_lr;
    ema: a mean that forgets, updated at every step."""
    swa_start_lr: float = 0.4
    """Learning-rate multiplier below which steps are averaged."""
    swa_every: int = 50
    """Steps between averaged weights."""
    ema_decay: float = 0.997
    """Weight of the old mean at each step; the start's share is divided out."""
    sums: Literal["float32", "parameter"] = "float32"
    """Dtype of the sums; "parameter", as published, adds bfloat16 embeddings in bfloat16 (an error of 2 % in 48)."""

    def __post_init__(self) -> None:
        _check(
            0 < self.swa_start_lr <= 1, f"average.swa_start_lr must lie above 0 and up to 1, got {self.swa_start_lr}"
        )
        _check(self.swa_every >= 1, f"average.swa_every must be at least 1, got {self.swa_every}")
        _check(0 < self.ema_decay < 1, f"average.ema_decay must lie between 0 and 1, got {self.ema_decay}")
        _check(
            self.kind == "swa" or self.sums == "float32",
            f"average.sums {self.sums} is of average.kind swa, got kind {self.kind}",
        )


@dataclass(frozen=True)
class QuantRule:
    """What one entry of `QuantConfig.rules` says."""

    pattern: str
    """Glob over published tensor names."""
    format: str
    """float32, float16 or int2 to int8."""
    group: int | None = None
    """Columns that share a scale; None: the row."""

    @classmethod
    def parse(cls, text: str) -> QuantRule:
        """PATTERN=FORMAT or PATTERN=FORMAT/GROUP. Raises ValueError."""
        match = re.fullmatch(r"([^=]+)=(float32|float16|int[2-8])(?:/([1-9][0-9]{0,5}))?", text)
        if not match or (match[3] and not match[2].startswith("int")):
            raise ValueError(
                f"quant.rules: {text!r} is not PATTERN=FORMAT with float32, float16 or int2 to int8, such as "
                "'tok_emb.weight=float16', '*.mlp.*=int5' or '*.attn.*=int6/64' (64 columns a scale)"
            )
        return cls(match[1], match[2], int(match[3]) if match[3] else None)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the trained weights become bytes, and whether training sees it. Small tensors are kept, matrices become
    integers with a scale a row."""

    bits: int = 8
    """Bits per matrix code, 2 to 8; codes are stored as bytes and left to the compressor."""
    rules: tuple[str, ...] = ()
    """Formats of some tensors, PATTERN=FORMAT[/GROUP], for example "*.mlp.*=int5" or "tok_emb.weight=float16"; the
    first that matches decides. Patterns are globs over published names (blocks.3.attn.c_q.weight); layers also
    count from the end (blocks.-1.)."""
    clip: Literal["max", "quantile"] = "max"
    """Row clip: the largest magnitude, or upstream's 0.9999984 quantile of the magnitudes."""
    clip_floor: float = 0.0
    """Smallest row clip. Published R0 to R4b use 1, which wastes levels on rows whose maximum is below 1."""
    scale_floor: float = 0.0
    """Smallest row scale; published R5 uses 2^-14, the smallest normal float16."""
    code_range: Literal["symmetric", "full"] = "symmetric"
    """Codes -m..m, m = 2^(bits-1) - 1, or -m-1..m as in published R4b and R5; rounding a row never needs the last."""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """Storage type of the row scales."""
    codes_from: Literal["stored_scale", "float32_scale"] = "stored_scale"
    """Scale that the codes are computed with: the stored one (right), or the one before rounding (upstream R0)."""
    keep_numel: int = 65_536
    """Matrices with at most this many elements are kept in float16."""
    control_dtype: Literal["float32", "float16"] = "float32"
    """Storage type of gains, scales, mixes and gates."""
    prune: float = 0.0
    """Share of each large matrix's smallest magnitudes that is set to zero before quantizing (published R5: 0.05)."""
    qat: Literal["off", "export", "r4", "r5"] = "off"
    """Fake quantization in training. export: every tensor as the artifact will hold it; r4, r5: as published, linear
    layers only, with unrounded scales without floors, r4 with the quantile clip and r5 with codes to -m-1."""
    qat_start: float = 0.0
    """Fraction of the budget after which it is on; 0: from the first step."""
    qat_below_lr: float = 1.0
    """It is on while the learning-rate multiplier is at most this."""
    compressor: Compressor = "smallest"
    """Compressor of the payload; smallest tries all at their highest level."""
    level: int | None = None
    """Level of the compressor: zlib 1-9, zstd 1-22, lzma 0-9, brotli 0-11; None: the highest."""

    def __post_init__(self) -> None:
        _check(2 <= self.bits <= 8, f"quant.bits must lie in 2..8, got {self.bits}")
        for rule in self.rules:
            QuantRule.parse(rule)
        for name in ("clip_floor", "scale_floor"):
            value = getattr(self, name)
            _check(0 <= value < 1024, f"quant.{name} must be at least 0 and below 1024, got {value}")
        _check(self.keep_numel >= 0, f"quant.keep_numel must not be negative, got {self.keep_numel}")
        _check(0 <= self.prune < 1, f"quant.prune must be at least 0 and below 1, got {self.prune}")
        _check(0 <= self.qat_start < 1, f"quant.qat_start must be at least 0 and below 1, got {self.qat_start}")
        _check(0 < self.qat_below_lr <= 1, f"quant.qat_below_lr must lie above 0 and up to 1, got {self.qat_below_lr}")
        _check(
            self.qat != "off" or (self.qat_start == 0 and self.qat_below_lr == 1),
            "quant.qat_start and quant.qat_below_lr say when fake quantization is on: set quant.qat (export, r4, r5)",
        )
        levels = {"zlib": (1, 9), "zstd": (1, 22), "lzma": (0, 9), "brotli": (0, 11)}
        if self.level is not None:
            _check(
                self.compressor in levels,
                f"quant.level {self.level} needs one quant.compressor; {self.compressor} uses the highest of each",
            )
            low, high = levels[self.compressor]
            _check(
                low <= self.level <= high, f"quant.level of {self.compressor} lies in {low}..{high}, got {self.level}"
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How the score is computed. Every token of the validation text is scored exactly once, unless `rule` says else."""

    window: int | None = None
    """Tokens per forward; None: data.seq_len."""
    stride: int | None = None
    """Tokens between window starts; None: the window (chunks). Each token then has window - stride or more
    tokens of context, except near the start of the text."""
    batch_tokens: int | None = None
    """Tokens per forward pass on one rank; None: 65,536 on a GPU, 16,384 on a CPU. Fewer need less memory; the score
    does not depend on it beyond rounding."""
    max_tokens: int | None = None
    """Score only this many leading tokens; the result is then labelled a partial score."""
    document_aware: bool = False
    """Whether tokens attend within their document only; a document starts at BOS, which is scored as the end of the
    one before. SmearGate and BigramHash then need model.document_start."""
    rule: Literal["every_token", "r4", "r4b"] = "every_token"
    """r4 and r4b score as the published recipes R4 and R4b do, and the label names the difference. r4: full windows
    only, and of each, the first included, the last `stride` tokens; the first window - stride tokens are never scored.
    r4b: the text is cut to a multiple of the window, and windows go on until `stride` tokens are left, the last ones
    shorter than `window`; each scores its last `stride` tokens, the first all of its own: the last tokens are scored,
    and counted, again by every short window."""

    def __post_init__(self) -> None:
        for name in ("window", "stride", "batch_tokens", "max_tokens"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"eval.{name} must be at least 1, got {value}")
        if self.window is not None and self.stride is not None:
            _check(
                self.stride <= self.window,
                f"eval.stride {self.stride} exceeds eval.window {self.window}: tokens would be skipped",
            )


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """The byte budget, in decimal bytes."""

    artifact_bytes: int = 16_000_000
    """Largest total of model.golf and code_bytes."""
    code_bytes: int = 60_000
    """Allowance for the code that ships with the model (published scripts: 47,642 to 57,201 bytes)."""
    fit: Literal["off", "mlp_hidden"] = "off"
    """mlp_hidden: before training, the widest MLP (a multiple of 16) whose forecast of model.golf lands reserve_bytes
    under the budget takes the place of model.mlp_hidden."""
    reserve_bytes: int = 200_000
    """Bytes that fit leaves free: weights of other distributions than the forecast's compress less."""

    def __post_init__(self) -> None:
        _check(self.artifact_bytes >= 1, f"budget.artifact_bytes must be at least 1, got {self.artifact_bytes}")
        _check(
            0 <= self.code_bytes < self.artifact_bytes,
            f"budget.code_bytes {self.code_bytes} leaves nothing of budget.artifact_bytes {self.artifact_bytes}",
        )
        _check(
            self.fit == "off" or 0 <= self.reserve_bytes < self.artifact_bytes - self.code_bytes,
            f"budget.reserve_bytes {self.reserve_bytes} leaves nothing of budget.artifact_bytes {self.artifact_bytes}",
        )


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how a run executes; no field changes what is computed beyond rounding."""

    device: Device = "auto"
    """auto: cuda where available, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of activations and of all matmuls, Newton-Schulz's too; auto: bfloat16 on cuda; on a CPU bfloat16 where it
    is clearly faster than float32, timed at the start and remembered. Parameters are float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the forward and backward; auto: on cuda only."""
    optimizer: Literal["replicated", "sharded"] = "replicated"
    """replicated: gradients are all-reduced and every rank orthogonalizes every matrix; sharded: each rank gets the
    gradients of its share of the matrices, steps those and hands out the new weights."""
    optimizer_graph: bool = False
    """Replay the whole optimizer step as one CUDA graph, captured in the warm-up; needs a GPU and warmup_steps."""
    attention: Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"] = "auto"
    """Backend of scaled_dot_product_attention; auto: of those that agree with math the fastest, timed at the start on
    a GPU and remembered; on a CPU the first."""
    warmup_steps: int = 20
    """Steps run and undone before the clock starts when compiling."""
    threads: int = 0
    """CPU threads for torch; 0: torch's default."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints, off the training clock; 0: only at the end or on a signal."""
    log_every: int = 50
    """Steps between train lines (the first ten steps are always logged)."""
    val_every: int = 0
    """Steps between validations of the unquantized weights, off the training clock; 0: none."""
    probe: bool = False
    """Whether a validation also exports: the score of the weights as decoded, and the artifact's bytes."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "threads", "checkpoint_seconds", "val_every"):
            _check(getattr(self, name) >= 0, f"runtime.{name} must not be negative, got {getattr(self, name)}")
        _check(self.log_every >= 1, f"runtime.log_every must be at least 1, got {self.log_every}")
        _check(not self.probe or self.val_every > 0, "runtime.probe is part of validations: set runtime.val_every")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = 1337
    """Seed of the initial weights; the order of the data does not depend on it."""

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**63, f"seed must lie in 0..2^63-1, got {self.seed}")
        window, stride = self.window, self.stride
        _check(stride <= window, f"eval.stride {stride} exceeds the window {window}: tokens would be skipped")

    @property
    def window(self) -> int:
        return self.eval.window or self.data.seq_len

    @property
    def stride(self) -> int:
        return self.eval.stride or self.window


Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a config dataclass, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: dict[str, Any], path: str = "") -> Config:
    """Rebuild a config from `to_dict`'s output; strict.

    Raises ValueError naming the full path of an unknown or missing key, a value of the wrong type, or a
    value that the dataclass refuses.
    """
    if not isinstance(values, dict):
        raise ValueError(f"config {path or 'root'}: expected an object, got {values!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {path}{close[0]}?" if close else ""
            raise ValueError(f"config: unknown key {path}{ascii(key)[1:-1][:80]}{hint}")
    if missing := [name for name in fields if name not in values]:
        raise ValueError(f"config: missing key {path}{missing[0]}")
    return cls(**{key: _convert(hints[key], value, path + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path + ".")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        ok = value in args
    elif origin is tuple:  # tuple[str, ...], a list in JSON
        ok = isinstance(value, list | tuple) and all(type(item) is args[0] for item in value)
        value = tuple(value) if ok else value
    elif origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, path)
    elif hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if ok else value
    else:
        ok = type(value) is hint
    if not ok:
        raise ValueError(f"config: {path} = {value!r} is not a valid {hint}")
    return value


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Fields in which two configs of the same class differ, as 'section.field: old -> new'."""
    out = []
    for item in dataclasses.fields(a):
        x, y = getattr(a, item.name), getattr(b, item.name)
        if dataclasses.is_dataclass(x):
            out += differences(x, y, f"{path}{item.name}.")
        elif x != y:
            out.append(f"{path}{item.name}: {x!r} -> {y!r}")
    return out
