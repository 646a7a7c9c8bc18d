"""The tokens that a training step reads: windows of one stream of all shards, where `golfgpt.data.orders` says."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from golfgpt.data.config import DataConfig
from golfgpt.data.orders import boundaries, steps, window_tokens
from golfgpt.data.shards import gather
from golfgpt.errors import InputError


class TokenStream:
    """Shards in order, repeated without end, as one stream of uint16 tokens."""

    def __init__(self, shards: Sequence[np.ndarray]):
        """`shards`: 1-d uint16 arrays, or `Shard`s. Raises InputError if they hold no token."""
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


class Tokens(NamedTuple):
    """What the spans of a rank read in a step."""

    windows: Tensor
    """int64 (windows, window_tokens + 1): inputs, and one more for the last target."""
    boundaries: list[Tensor] | None
    """For each window with order "packed", where its segments start (golfgpt.data.orders.boundaries)."""

    def to(self, device: torch.device) -> Tokens:
        """The same on `device`, without waiting for it."""
        parts = self.boundaries and [part.to(device, non_blocking=True) for part in self.boundaries]
        return Tokens(self.windows.to(device, non_blocking=True), parts)

    def with_room(self) -> Tokens:
        """The same with room for twice as many segments and 64 more."""
        end = self.windows.size(1) - 1
        return self._replace(
            boundaries=self.boundaries and [F.pad(part, (0, len(part) + 64), value=end) for part in self.boundaries]
        )

    def hold(self, other: Tokens) -> bool:
        """Whether `other` fits into these tensors."""
        return all(len(a) >= len(b) for a, b in zip(self.boundaries or (), other.boundaries or (), strict=True))

    def copy_(self, other: Tokens) -> None:
        """Take the values of `other`, which fits, without waiting for the device."""
        self.windows.copy_(other.windows, non_blocking=True)
        for mine, its in zip(self.boundaries or (), other.boundaries or (), strict=True):
            mine[: len(its)].copy_(its, non_blocking=True)
            mine[len(its) :] = self.windows.size(1) - 1


class Prefetcher:
    """The tokens of a rank's spans, step by step, read a step ahead by a thread."""

    def __init__(self, shards: Sequence[np.ndarray], config: DataConfig, assigned: range, *, pin: bool):
        """`assigned`: the spans to read (`spans_of_rank`); `pin`: use page-locked memory, for copies to a GPU. Raises
        InputError for shards that the order cannot read."""
        self._stream, self._shards = TokenStream(shards), [shard for shard in shards if len(shard)]
        self._config, self._assigned, self._pin = config, assigned, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[Tokens]] | None = None
        self._begin()
        self._rehearsed = [next(self._steps), next(self._steps)]
        self._begin()

    def _begin(self) -> None:
        self._steps, self._done = steps(self._config, self._shards, self._assigned), 0

    def seek(self, step: int) -> None:
        """Wait until `step` is read, which may mean to draw again what random orders drew before it."""
        if self._ahead:
            self._ahead[1].result()
        self._ahead = step, self._thread.submit(self._read, step)
        self._ahead[1].result()

    def read(self, step: int) -> Tokens:
        """What the spans of this rank read in `step`; the step after it is read meanwhile."""
        ahead, self._ahead = self._ahead, None
        tokens = ahead[1].result() if ahead else None
        if tokens is None or ahead[0] != step:
            tokens = self._read(step)
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        return tokens

    def _read(self, step: int) -> Tokens:
        count, order = window_tokens(self._config) + 1, self._config.order
        windows = np.stack([self._stream.read(int(position), count) for position in self._positions(step).flat])
        found = None
        if order == "packed":
            start, longest = self._config.document_start, self._config.seq_len
            found = [self._host(boundaries(window[:-1], start, longest)) for window in windows]
        return Tokens(self._host(windows.astype(np.int64)), found)

    def _positions(self, step: int) -> np.ndarray:
        """Starts of the windows of `step`. Orders only go forward: an earlier step begins again."""
        if step < 2:  # what rehearsals take, and read ahead
            return self._rehearsed[step]
        if step < self._done:
            self._begin()
        while self._done <= step:
            positions = next(self._steps)
            self._done += 1
        return positions

    def _host(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin else tensor

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def spans_of_rank(rank: int, world: int, spans: int) -> range:
    """Spans that `rank` of `world` processes: contiguous, the first ranks take one more (3 ranks: 3/3/2)."""
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} is not in 0..{world - 1}")
    each, more = divmod(spans, world)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))
