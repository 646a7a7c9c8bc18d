"""Config of the training data. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from golfgpt.fields import Count, Section


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Training data, and how many tokens a step reads."""

    path: str | None = None
    """Folder from `golfgpt data prepare`, or with published *_train_*.bin and *_val_*.bin shards."""
    batch_tokens: Count = 524_288
    """Target tokens per optimizer step, over all ranks."""
    seq_len: Count = 1024
    """Tokens per training sequence."""
    spans: Count = 8
    """Contiguous spans of tokens that a step reads. They are divided among the ranks, so there can be at most this many
    ranks."""
    microbatch_tokens: Count | None = None
    """Tokens per forward and backward; None: one span. Fewer tokens need less memory; more (several spans at once) need
    fewer kernel launches. The result of the step is the same."""

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

    @property
    def span_tokens(self) -> int:
        return self.batch_tokens // self.spans

    @property
    def microbatch(self) -> int:
        """Tokens per forward and backward."""
        return self.microbatch_tokens or self.span_tokens
