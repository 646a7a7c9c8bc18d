"""Config of the evaluation. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golfgpt.fields import Count, Section


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
    """Tokens per forward pass on one rank; None: 65,536 on a GPU, 16,384 on a CPU. Fewer tokens need less memory.
    The score depends on it only by rounding."""
    max_tokens: Count | None = None
    """Score only this many tokens from the start of the text; the result is labelled as a partial score."""
    document_aware: bool = False
    """Whether tokens attend only within their document. A document starts at BOS, which is scored as the last token of
    the previous document. Models with SmearGate or BigramHash then need model.document_start."""
    rule: Literal["every_token", "r4", "r4b"] = "every_token"
    """Which tokens are scored. r4 and r4b follow the published scripts of R4 and R4b; the label of the score names the
    difference. r4: only full windows, and only the last `stride` tokens of each, also of the first, so the first
    window - stride tokens of the text are never scored. r4b: the text is cut to a multiple of the window, and windows
    start until `stride` tokens are left, so the last ones are shorter than `window`. The first window scores all its
    tokens, every other one its last `stride` tokens. The last tokens of the text are therefore scored and counted again
    by every short window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.stride and self.stride > self.window:
            raise ValueError(
                f"eval.stride {self.stride} exceeds eval.window {self.window}, so tokens would be skipped; expected "
                f"at most {self.window}"
            )
