"""Data orders: the positions in the stream that each span of a step reads, from every shard's length and step number.

    sequential   step s, span i: tokens [s (B + S) + i (B/S + 1), + B/S + 1), in one stream of all shards without end
    shuffled     span i reads the shards i, i + S, ... only; each is cut into sequences from a random phase on, and the
                 span draws from those of all its shards without replacement (2026-04-05)
    coprime      a step draws sequences from 8 and, later, 32 shards or more, and walks through each shard's sequences
                 by a stride that is coprime to their number (PR #726, 2026-03-29)
    packed       rows of n tokens one after another, from the first document start of a shard on; what is left of a
                 shard when its S rows of n + 1 tokens do not fit is skipped (2026-04-10)

B = batch_tokens, S = spans. All of a step but the tokens themselves follows from the lengths of the shards (and where
packed ones start), so a step reads the same tokens on any number of ranks, and a run resumes from the step number. The
orders with random choices then make them again from step 0, which takes seconds and is not training time.

The published seeds are fixed, so orders do not depend on the run's seed: shuffled has the span's number; coprime a hash
of the shards' paths, which a run elsewhere cannot repeat, so here it is one of their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from golfgpt.data.config import DataConfig
from golfgpt.errors import InputError

Steps = Iterator[np.ndarray]
"""For each step from 0 on, int64 (spans, windows): where in the stream each window of a span starts."""


def window_tokens(config: DataConfig) -> int:
    """Tokens of a window without its last target."""
    return {"sequential": config.span_tokens, "packed": config.microbatch}.get(config.order, config.seq_len)


def steps(config: DataConfig, shards: Sequence[np.ndarray], assigned: range) -> Steps:
    """The steps of `config.order` for the spans `assigned`, over the tokens (T,) of each shard. Raises InputError for
    shards that do not suffice."""
    order = {"sequential": sequential, "shuffled": shuffled, "coprime": coprime, "packed": packed}[config.order]
    return order(config, shards, assigned)


def sequential(config: DataConfig, shards: Sequence[np.ndarray], assigned: range) -> Steps:
    for step in count():
        positions = step_spans(step, config.batch_tokens, config.spans)
        yield np.array([[positions[span]] for span in assigned], dtype=np.int64)


def step_spans(step: int, batch_tokens: int, spans: int) -> list[int]:
    """Stream positions of the spans of a sequential `step`; each span is batch_tokens / spans + 1 tokens long."""
    if spans < 1 or batch_tokens < 1 or batch_tokens % spans:
        raise InputError(f"batch_tokens {batch_tokens} is not a positive multiple of spans {spans}")
    start = step * (batch_tokens + spans)
    return [start + i * (batch_tokens // spans + 1) for i in range(spans)]


def shuffled(config: DataConfig, shards: Sequence[np.ndarray], assigned: range) -> Steps:
    firsts, lengths = _layout(shards)
    for span in range(config.spans):
        if max(lengths[span :: config.spans], default=0) <= config.seq_len:
            raise InputError(
                f"data.order shuffled found no sequence for span {span}: each of data.spans = {config.spans} expected "
                f"a shard of its own of more than data.seq_len = {config.seq_len} tokens, got shards of {lengths[:8]} "
                "tokens; prepare the data in more shards (golfgpt data prepare --shard-tokens), or lower data.spans"
            )
    draws = [
        _draws(span, firsts[span :: config.spans], lengths[span :: config.spans], config.seq_len) for span in assigned
    ]
    windows = config.span_tokens // config.seq_len
    while True:
        yield np.array([[next(each) for _ in range(windows)] for each in draws], dtype=np.int64)


def _draws(seed: int, firsts: Sequence[int], lengths: Sequence[int], seq_len: int) -> Iterator[int]:
    """Positions of one span's sequences, without end."""
    random = np.random.Generator(np.random.PCG64(seed))
    while True:
        waiting = []
        for first, length in zip(firsts, lengths, strict=True):
            phase, blocks = _phase(random, length, seq_len)
            waiting.append(first + phase + random.permutation(blocks) * seq_len)
        left = np.array([len(each) for each in waiting], dtype=float)
        total = int(left.sum())
        for drawn, number in enumerate(random.random(total)):
            # Generator.choice(len(left), p=left / left.sum()), without the checks that take most of its time.
            share = (left / (total - drawn)).cumsum()
            shard = (share / share[-1]).searchsorted(number, side="right")
            left[shard] -= 1
            yield int(waiting[shard][int(left[shard])])


def coprime(config: DataConfig, shards: Sequence[np.ndarray], assigned: range) -> Steps:
    firsts, lengths = _layout(shards)
    usable = [i for i, length in enumerate(lengths) if length > config.seq_len]
    if not usable:
        raise InputError(f"data.order coprime found no shard of more than data.seq_len = {config.seq_len} tokens")
    seed = 0
    for byte in str(lengths).encode():
        seed = (seed ^ byte) * 1_099_511_628_211 % 2**64
    random = np.random.Generator(np.random.PCG64(seed))
    walks = {i: _Walk(random, lengths[i], config.seq_len) for i in usable}
    total = config.batch_tokens // config.seq_len
    for step in count():
        late = min(step / 1800, 1.0)
        weights = np.array([walks[i].remaining for i in usable], dtype=float) ** (0.9 - 0.4 * late)
        weights /= weights.sum()
        few, many = (min(most, len(usable), total) for most in (max(8, config.spans), max(32, 8 * config.spans)))
        chosen = random.choice(len(usable), size=round(few + late * (many - few)), replace=False, p=weights)
        counts = np.ones(len(chosen), dtype=int)
        if total > len(chosen):
            counts += random.multinomial(total - len(chosen), weights[chosen] / weights[chosen].sum())
        order = random.permutation(len(chosen))
        piles = []
        for i, size in zip(chosen[order], counts[order], strict=True):
            shard = usable[i]
            pile = [firsts[shard] + walks[shard].next() for _ in range(size)]
            piles.append([pile[k] for k in random.permutation(size)] if size > 1 else pile)
        windows = []
        while piles:
            piles = [piles[i] for i in random.permutation(len(piles))]
            windows += [pile.pop() for pile in piles]
            piles = [pile for pile in piles if pile]
        yield np.array([windows[span :: config.spans] for span in assigned], dtype=np.int64)


class _Walk:
    """Every sequence of a shard once, by strides; then again with another phase, start and stride."""

    def __init__(self, random: np.random.Generator, length: int, seq_len: int):
        self._random, self._length, self._seq_len = random, length, seq_len
        self._blocks, self._done = 0, 0

    @property
    def remaining(self) -> int:
        left = self._blocks - self._done if self._blocks else (self._length - 1) // self._seq_len
        return max(left, 1)

    def next(self) -> int:
        """Offset of a sequence in the shard."""
        if self._done == self._blocks:
            self._phase, self._blocks = _phase(self._random, self._length, self._seq_len)
            self._start = int(self._random.integers(self._blocks)) if self._blocks > 1 else 0
            self._stride = 1
            while self._blocks > 1:
                self._stride = int(self._random.integers(1, self._blocks))
                if math.gcd(self._stride, self._blocks) == 1:
                    break
            self._done = 0
        block = (self._start + self._done * self._stride) % self._blocks
        self._done += 1
        return self._phase + block * self._seq_len


def _phase(random: np.random.Generator, length: int, seq_len: int) -> tuple[int, int]:
    """Where the first sequence of a shard of `length` tokens starts, and how many there are."""
    most = min(seq_len - 1, length - seq_len - 1)
    phase = int(random.integers(most + 1)) if most > 0 else 0
    return phase, max(length - 1 - phase, 0) // seq_len


def packed(config: DataConfig, shards: Sequence[np.ndarray], assigned: range) -> Steps:
    firsts, lengths = _layout(shards)
    row = config.microbatch + 1
    begins = [_first_document(shard, i, config.document_start) for i, shard in enumerate(shards)]
    if all(length - begin < config.spans * row for begin, length in zip(begins, lengths, strict=True)):
        raise InputError(
            f"data.order packed found no shard with data.spans x (data.microbatch_tokens + 1) = {config.spans * row} "
            f"tokens after its first document start; the longest shard has {max(lengths)}: lower one of the two"
        )
    rows, shard, cursor = config.span_tokens // config.microbatch, 0, begins[0]
    while True:
        starts = []
        for _ in range(rows):
            while cursor + config.spans * row > lengths[shard]:
                shard = (shard + 1) % len(shards)
                cursor = begins[shard]
            starts.append(firsts[shard] + cursor)
            cursor += config.spans * row
        yield np.array([[start + span * row for start in starts] for span in assigned], dtype=np.int64)


def _first_document(shard: np.ndarray, index: int, start: int | None) -> int:
    for begin in range(0, len(shard), 1 << 20):
        found = np.flatnonzero(shard[begin : begin + (1 << 20)] == start)
        if len(found):
            return begin + int(found[0])
    raise InputError(
        f"data.order packed found no token {start} (data.document_start) in training shard {index}, so no document "
        "starts there; give the id of the token that starts documents, or choose another data.order"
    )


def _layout(shards: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Stream position and length of each shard."""
    lengths = [len(shard) for shard in shards]
    return np.cumsum([0, *lengths[:-1]]).tolist(), lengths


def boundaries(tokens: np.ndarray, start: int, longest: int, multiple: int = 64) -> np.ndarray:
    """Where the segments of a packed row start, and then its length: int32 (n,), cu_seqlens of FlashAttention.

    `tokens` (T,) are the row's inputs. A segment is what the row holds of a document, cut every `longest` tokens. The
    length is repeated until n is a multiple of `multiple`."""
    length = len(tokens)
    begins = np.union1d(0, np.flatnonzero(tokens == start))
    cuts = [np.arange(a, b, longest) for a, b in zip(begins, [*begins[1:], length], strict=True)]
    found = np.concatenate(cuts)
    out = np.full(-(-(len(found) + 1) // multiple) * multiple, length, dtype=np.int32)
    out[: len(found)] = found
    return out
