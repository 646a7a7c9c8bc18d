"""Reference compressors: bits per byte without a training run, of the same text and with the divisor of `val_bpb`.

    gzip    zlib level 9          zstd    level 22, window as long as the text
    xz      LZMA preset 9         bigram  p(c | b), fitted on train tokens

Compressors see the decoded val text and nothing else. The bigram is Witten-Bell's interpolation,

    p(c | b) = (n(b, c) + t(b) p(c)) / (n(b) + t(b)),    p(c) = (n(c) + 1) / (n + V),

with t(b) the number of distinct successors of b: it sums to 1 for every b, seen or not, and needs no tuning.
Like the scorer it predicts every val token but the first.
"""

from __future__ import annotations

import contextlib
import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import zstandard

from golfgpt.bpb import bits_per_byte, decoded_texts
from golfgpt.data.shards import CHUNK_TOKENS, Dataset
from golfgpt.errors import InputError
from golfgpt.files import read_json, write_json

BIGRAM_TRAIN_TOKENS = 50_000_000
"""Train tokens that the bigram is fitted on at most, from the start of the stream."""
CACHE = "baselines.json"  # the name that prepared folders have it under; measuring again takes half a minute


@dataclass(frozen=True)
class _BitsPerByte:
    gzip: float
    xz: float
    zstd: float
    bigram: float


@dataclass(frozen=True)
class _Kept:
    digest: str
    bits_per_byte: _BitsPerByte


def compressors_bpb(data: Dataset) -> dict[str, float]:
    """Bits per byte of "gzip", "xz", "zstd" and "bigram" on the val text of `data`.

    Kept with the data set's digest in `baselines.json` in the data folder, if that can be written. Proves the divisor
    first (`Dataset.prove_val_bytes`) and raises what that raises.
    """
    cache = data.path / CACHE
    with contextlib.suppress(OSError, ValueError):
        kept = read_json(cache, _Kept)
        if kept.digest == data.digest:
            return asdict(kept.bits_per_byte)
    nbytes = data.prove_val_bytes()
    sizes = _compressed_sizes(data, nbytes)
    values = {name: 8 * size / nbytes for name, size in sizes.items()}
    values["bigram"] = bits_per_byte(Bigram(data).nats(data), nbytes)
    with contextlib.suppress(OSError):
        write_json(cache, {"digest": data.digest, "bits_per_byte": values})
    return values


def _compressed_sizes(data: Dataset, nbytes: int) -> dict[str, int]:
    def size(compressor: Any) -> int:
        texts = decoded_texts(data.need_tokenizer(), data.val_chunks(data.val_tokens))
        return sum(len(compressor.compress(text.encode())) for text in texts) + len(compressor.flush())

    compressors = {
        "gzip": zlib.compressobj(9, wbits=31),
        "xz": lzma.LZMACompressor(preset=9),
        "zstd": zstandard.ZstdCompressor(level=22).compressobj(size=nbytes),
    }
    with ThreadPoolExecutor() as pool:  # they release Python's lock; one after another: xz 14 s, zstd 11 s for 7.6 MB
        return dict(zip(compressors, pool.map(size, compressors.values()), strict=True))


class Bigram:
    """Witten-Bell bigram over token ids; sparse, so that 65,536 pieces need no table of their square."""

    def __init__(self, data: Dataset, max_tokens: int = BIGRAM_TRAIN_TOKENS):
        """Fit on the first `max_tokens` train tokens: about 16 bytes of memory per distinct pair, 3 times that
        while merging."""
        self.vocab_size = data.need_tokenizer().vocab_size
        keys, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        unigrams = np.zeros(self.vocab_size)
        remaining = max_tokens
        for shard in data.train:
            for start in range(0, min(len(shard), remaining), 4 * CHUNK_TOKENS):
                stop = min(start + 4 * CHUNK_TOKENS, remaining, len(shard))
                unigrams += np.bincount(shard[start:stop], minlength=self.vocab_size)
                new, new_counts = np.unique(self._keys(shard[start : stop + 1]), return_counts=True)
                keys, where = np.unique(np.concatenate([keys, new]), return_inverse=True)
                counts = np.bincount(where, np.concatenate([counts, new_counts])).astype(np.int64)
            remaining -= min(len(shard), remaining)
        if not unigrams.sum():
            raise InputError(f"{data.path}: train holds no token to fit a bigram on; prepare the data again")
        self._pairs = np.append(keys, self.vocab_size**2)  # above any pair, so that a search always ends inside
        self._counts = np.append(counts, 0)
        self._unigram = (unigrams + 1) / (unigrams.sum() + self.vocab_size)
        first = keys // self.vocab_size
        self._context = np.bincount(first, counts, minlength=self.vocab_size)
        self._distinct = np.bincount(first, minlength=self.vocab_size).astype(float)

    def _keys(self, ids: np.ndarray) -> np.ndarray:
        return ids[:-1].astype(np.int64) * self.vocab_size + ids[1:]

    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        """p(ids[t + 1] | ids[t]) for t = 0 .. T-2 (float64) of tokens (T,)."""
        keys = self._keys(ids)
        at = np.searchsorted(self._pairs, keys)
        seen = np.where(self._pairs[at] == keys, self._counts[at], 0)
        context, distinct = self._context[ids[:-1]], self._distinct[ids[:-1]]
        unigram = self._unigram[ids[1:]]
        known = np.maximum(context + distinct, 1)
        return np.where(context > 0, (seen + distinct * unigram) / known, unigram)

    def nats(self, data: Dataset) -> float:
        """Negative log-likelihood of all val tokens but the first."""
        total = 0.0
        for start in range(0, data.val_tokens - 1, CHUNK_TOKENS):
            ids = data.val_ids(start, start + CHUNK_TOKENS + 1)
            total -= float(np.log(self.probabilities(ids)).sum())
        return total
