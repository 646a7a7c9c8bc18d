"""Config of the training data. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golfgpt.fields import Count, CountOrZero, Section


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Training data, and how many tokens a step reads."""

    path: str | None = None
    """Folder from `golfgpt data prepare`, or with published *_train_*.bin and *_val_*.bin shards."""
    batch_tokens: Count = 524_288
    """Target tokens per optimizer step, over all ranks."""
    seq_len: Count = 1024
    """Tokens per training sequence; with order "packed", the most that attend to each other."""
    spans: Count = 8
    """Parts of the tokens that a step reads. They are divided among the ranks, so there can be at most this many ranks.
    A span reads what a process of a published run reads that has as many processes."""
    microbatch_tokens: Count | None = None
    """Tokens per forward and backward; None: one span. Fewer tokens need less memory; more (several spans at once) need
    fewer kernel launches. The result of the step is the same, except with order "packed", which fills rows of this
    many tokens."""
    order: Literal["sequential", "shuffled", "coprime", "packed"] = "sequential"
    """Which tokens a step reads (golfgpt.data.orders has the rules). sequential: the next ones. shuffled: sequences at
    random, from shards of the span's own (2026-04-05). coprime: sequences of many shards, by strides (parameter-golf PR
    #726). packed: the next ones, in rows of whole microbatches; tokens attend only within their document
    (2026-04-10)."""
    document_start: CountOrZero | None = None
    """Token id that starts a document (BOS, 1 in published and prepared data), for order "packed"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = self.spans * self.seq_len
        if self.batch_tokens % unit:
            raise ValueError(
                f"data.batch_tokens {self.batch_tokens} is not a multiple of {unit}; expected a multiple of "
                f"data.spans * data.seq_len = {self.spans} * {self.seq_len}"
            )
        if (self.microbatch_tokens or 0) % self.seq_len:
            raise ValueError(
                f"data.microbatch_tokens is {self.microbatch_tokens}; expected a multiple of data.seq_len "
                f"{self.seq_len}"
            )
        if (self.document_start is not None) != (self.order == "packed"):
            raise ValueError(
                f"data.document_start is {self.document_start} and data.order is {self.order}; expected the id of the "
                'token that starts documents (BOS, 1 in prepared data) with order "packed", and None with any other'
            )
        if self.order == "packed" and self.span_tokens % self.microbatch:
            raise ValueError(
                f"data.microbatch_tokens is {self.microbatch}; expected a divisor of the span's {self.span_tokens} "
                'tokens with data.order "packed"'
            )

    @property
    def span_tokens(self) -> int:
        return self.batch_tokens // self.spans

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of a forward."""
        return self.microbatch if self.order == "packed" else self.seq_len

    @property
    def microbatch(self) -> int:
        """Tokens per forward and backward."""
        return self.microbatch_tokens or self.span_tokens
