"""Which tokens a step sees. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from golfgpt.fields import Count, Section


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Which tokens a step sees."""

    path: str | None = None
    """Folder made by `golfgpt data prepare` (or holding published *_train_*.bin and *_val_*.bin shards)."""
    batch_tokens: Count = 524_288
    """Target tokens per optimizer step, over all ranks."""
    seq_len: Count = 1024
    """Tokens per training sequence."""
    spans: Count = 8
    """Contiguous spans that a step reads; they are dealt to the ranks, so at most this many ranks take part."""
    microbatch_tokens: Count | None = None
    """Tokens per forward and backward; None: one span. Fewer need less memory, more (several spans at once) less
    launching; the step stays the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = self.spans * self.seq_len
        if self.batch_tokens % unit:
            raise ValueError(
                f"data.batch_tokens {self.batch_tokens} is not a multiple of data.spans * data.seq_len = "
                f"{self.spans} * {self.seq_len} = {unit}"
            )
        if (self.microbatch_tokens or 0) % self.seq_len:
            raise ValueError(
                f"data.microbatch_tokens {self.microbatch_tokens} is not a multiple of data.seq_len {self.seq_len}"
            )

    @property
    def span_tokens(self) -> int:
        return self.batch_tokens // self.spans

    @property
    def microbatch(self) -> int:
        """Tokens per forward and backward."""
        return self.microbatch_tokens or self.span_tokens
