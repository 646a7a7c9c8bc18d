"""Config of the evaluation. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golfgpt.fields import Count, FractionBelowOne, NotNegative, Positive, Section


@dataclass(frozen=True, kw_only=True)
class SGDConfig(Section):
    """SGD of all weights on text that is scored (golfgpt.score.ttt.sgd): of kind "sgd" after each chunk of the text, of
    kind "phased" in each phase. None: as published, which differs between the two."""

    SECTION = "eval.ttt.sgd"

    lr: Positive | None = None
    """At the first chunk; it falls to 0 at the last one along a cosine. None: 0.005, phased 0.001."""
    epochs: Count | None = None
    """Passes over a chunk. None: 3, phased 1."""
    chunk_tokens: Count = 32_768
    """Tokens that are learned at one learning rate: kind "sgd" scores as many before it learns from them. The last
    chunk is not learned."""
    batch_sequences: Count = 32
    """Most sequences of the window's length in a step, over all ranks."""
    momentum: FractionBelowOne = 0.9
    grad_clip_norm: Positive = 1.0
    """Most that the gradient's norm over all weights may be; a larger one is scaled down to it."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Section):
    """A LoRA for each document, learned while it is scored (golfgpt.score.ttt.lora)."""

    SECTION = "eval.ttt.lora"

    rank: Count = 96
    alpha: Positive | None = None
    """Outputs are multiplied by alpha / rank; None: by 1."""
    targets: tuple[Literal["q", "k", "v", "o", "mlp", "head"], ...] = ("q", "k", "v", "o", "mlp", "head")
    """What gets one. o and mlp are paths beside attention and MLP, from their normed inputs."""
    lr: Positive = 1e-4
    """Of AdamW with beta1 0 and eps 1e-10, without a schedule."""
    beta2: FractionBelowOne = 0.999
    weight_decay: NotNegative = 0.5
    chunk_tokens: Count = 48
    """Tokens of a document that are scored before they are learned."""
    documents: Count = 64
    """Documents in a batch, each with a LoRA of its own. Fewer need less memory."""
    order: Literal["length", "stream"] = "length"
    """In which order documents are scored. length: the longest first, with others of similar length, as published: with
    weights that carry over, the score is then no code length of the text as it stands. stream: as they stand."""
    warm: bool = False
    """Whether a document starts with the A that its place in the last full batch ended with; B is always 0 at first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"eval.ttt.lora.targets is {self.targets}; expected some of q, k, v, o, mlp, head, once each"
            )


@dataclass(frozen=True, kw_only=True)
class TTTConfig(Section):
    """Test-time training: weights learn from validation tokens after these are scored. The adapted score is a second
    one, beside the plain score."""

    SECTION = "eval.ttt"

    kind: Literal["off", "sgd", "lora", "phased"] = "off"
    """sgd: chunks of the text in windows, all weights (2026-03-23). lora: a LoRA per document (2026-04-10). phased: the
    same, and in phases SGD of all weights on the documents scored so far (2026-04-13)."""
    max_seconds: Positive = 600.0
    """Wall clock of the adapted score; what is scored by then is kept, and its label says so."""
    sgd: SGDConfig = SGDConfig()
    lora: LoRAConfig = LoRAConfig()
    phases: Count = 3
    """Phases of kind "phased"."""
    phase_documents: Count = 2000
    """Documents that are scored before the last phase, which learns from so many; earlier ones come after and learn
    from a proportional share."""


TTT_READS = {"off": (), "sgd": ("sgd.", "max_seconds"), "lora": ("lora.", "max_seconds"), "phased": ("",)}
"""Kind of test-time training -> how the fields of TTTConfig begin that it reads, beside `kind`."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluation. Every token of the validation text except the first is scored exactly once, unless `rule` is
    changed."""

    window: Count | None = None
    """Tokens per forward; None: data.seq_len."""
    stride: Count | None = None
    """Tokens between window starts; None: the window (chunks). Each token has at least window - stride tokens of
    context, except near the start of the text."""
    batch_tokens: Count | None = None
    """Tokens per forward pass on one rank; fewer than a window count as one. None: 65,536 on a GPU, 16,384 on a CPU.
    Fewer tokens need less memory. The score depends on it only by rounding."""
    max_tokens: Count | None = None
    """Score only this many tokens from the start of the text; the result is labelled as a partial score."""
    document_aware: bool = False
    """Whether tokens attend only within their document. A document starts at BOS, which is scored as the last token of
    the previous document. Models with SmearGate or BigramHash then need model.document_start."""
    rule: Literal["every_token", "r4", "r4b", "varlen"] = "every_token"
    """Which tokens are scored. r4, r4b and varlen follow published scripts; the label of the score names the
    difference. r4: only full windows, and only the last `stride` tokens of each, also of the first, so the first
    window - stride tokens of the text are never scored. r4b: the text is cut to a multiple of the window, and windows
    start until `stride` tokens are left, so the last ones are shorter than `window`. The first window scores all its
    tokens, every other one its last `stride` tokens. The last tokens of the text are therefore scored and counted again
    by every short window. varlen, the diagnostic of the records from 2026-04-10 on: rows of 32 windows, in which tokens
    attend within their document, cut every `window` tokens; what does not fill a row in its eighth of the text is not
    scored. `stride` and `batch_tokens` are not used then."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the forward, except under rule varlen. auto: on cuda unless runtime.compile is off. A CPU
    compiles for half a minute, which only a long text repays."""
    ttt: TTTConfig = TTTConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.stride and self.stride > self.window:
            raise ValueError(
                f"eval.stride {self.stride} exceeds eval.window {self.window}, so tokens would be skipped; expected "
                f"at most {self.window}"
            )
        if self.ttt.kind != "off" and self.rule != "every_token":
            raise ValueError(
                f'eval.rule is {self.rule}, which scores tokens never or more than once; expected "every_token" with '
                f"eval.ttt.kind {self.ttt.kind}"
            )
