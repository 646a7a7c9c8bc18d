"""How the score is computed. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golfgpt.fields import Count, Section


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """How the score is computed. Every token of the validation text is scored exactly once, unless `rule` says else."""

    window: Count | None = None
    """Tokens per forward; None: data.seq_len."""
    stride: Count | None = None
    """Tokens between window starts; None: the window (chunks). Each token then has window - stride or more
    tokens of context, except near the start of the text."""
    batch_tokens: Count | None = None
    """Tokens per forward pass on one rank; None: 65,536 on a GPU, 16,384 on a CPU. Fewer need less memory; the score
    does not depend on it beyond rounding."""
    max_tokens: Count | None = None
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
        super().__post_init__()
        if self.window and self.stride and self.stride > self.window:
            raise ValueError(f"eval.stride {self.stride} exceeds eval.window {self.window}: tokens would be skipped")
