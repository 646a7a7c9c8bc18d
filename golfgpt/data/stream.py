"""Which tokens a training step reads: one endless sequential stream, assigned to the ranks in spans.

    step s, span i:  tokens [s (B + S) + i (B/S + 1),  + B/S + 1)      B = batch_tokens, S = spans

so a step consumes B + S tokens and spans share none: each span holds B/S inputs and the target of the last.
The stream wraps at its end, has no shuffling and no state but the position, so a run resumes from the step
number, and the data of a step are the same for every number of ranks. With S = 8 this is the published order.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from golfgpt.data.shards import gather
from golfgpt.errors import InputError


class TokenStream:
    """Shards in order, repeated without end, as one stream of uint16 tokens."""

    def __init__(self, shards: Sequence[np.ndarray]):
        """`shards`: 1-d uint16 arrays or memory maps. Raises InputError if they hold no token."""
        self._shards = [shard for shard in shards if len(shard)]
        self.total_tokens = sum(map(len, self._shards))
        if not self.total_tokens:
            raise InputError("the training stream is empty: the shards hold no token; prepare the data again")

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` tokens (uint16, a copy) from absolute `position`; wraps, more than once if `count` is that large."""
        out = np.empty(count, dtype=np.uint16)
        done = 0
        while done < count:
            start = (position + done) % self.total_tokens
            part = gather(self._shards, start, min(start + count - done, self.total_tokens))
            out[done : done + len(part)] = part
            done += len(part)
        return out


class Prefetcher:
    """The tokens of a rank's spans, step by step, read a step ahead by a thread."""

    def __init__(self, stream: TokenStream, batch_tokens: int, spans: int, assigned: range, *, pin: bool):
        """`assigned`: the spans to read (`spans_of_rank`); `pin`: use page-locked memory, for copies to a GPU."""
        self._stream, self._batch_tokens, self._spans = stream, batch_tokens, spans
        self._assigned, self._pin = assigned, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[Tensor]] | None = None

    def read(self, step: int) -> Tensor:
        """int64 (spans of this rank, batch_tokens / spans + 1) of `step`; the step after it is read meanwhile."""
        ahead, self._ahead = self._ahead, None
        tokens = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        return tokens

    def _read(self, step: int) -> Tensor:
        positions = step_spans(step, self._batch_tokens, self._spans)
        count = self._batch_tokens // self._spans + 1
        tokens = np.stack([self._stream.read(positions[span], count) for span in self._assigned]).astype(np.int64)
        return torch.from_numpy(tokens).pin_memory() if self._pin else torch.from_numpy(tokens)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def step_spans(step: int, batch_tokens: int, spans: int) -> list[int]:
    """Stream positions of the spans of `step`; each span is batch_tokens / spans + 1 tokens long."""
    if spans < 1 or batch_tokens < 1 or batch_tokens % spans:
        raise InputError(f"batch_tokens {batch_tokens} is not a positive multiple of spans {spans}")
    start = step * (batch_tokens + spans)
    return [start + i * (batch_tokens // spans + 1) for i in range(spans)]


def spans_of_rank(rank: int, world: int, spans: int) -> range:
    """Spans that `rank` of `world` processes: contiguous, the first ranks take one more (3 ranks: 3/3/2)."""
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} is not in 0..{world - 1}")
    each, more = divmod(spans, world)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))
