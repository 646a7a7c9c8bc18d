"""The windows of three published scoring rules, which do not score every token but the first of the text exactly once.

All return what `golfgpt.score.windows.every_token` does, as int64 arrays (n,) for n windows over `targets` targets:

    start          first token that the window reads
    length         tokens that it reads
    first_scored   offset in it of the first target that it scores; it scores all from there on
"""

from __future__ import annotations

import itertools

import numpy as np

VARLEN_SEQUENCES, VARLEN_SPANS = 32, 8
"""Sequences in a row of varlen, and ranks of its published runs."""


def r4(targets: int, window: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R4 (PR #65): full windows only, and each, the first included, scores its last S targets.

    The first L - S targets are never scored, nor are the last ones where S does not divide targets - L.
    """
    start = np.arange(0, targets - window + 1, stride, dtype=np.int64)
    length = np.full_like(start, window)
    return start, length, length - stride


def r4b(targets: int, window: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R4b (PR #66): windows go on while S targets are left, so the last ones are shorter than L.

    The first window scores all its targets, each later one its last S: the last S of the text are scored again by
    every short window. The published script cuts the text to a multiple of L targets first.
    """
    start = np.arange(0, targets - stride + 1, stride, dtype=np.int64)
    length = np.minimum(targets - start, window)
    return start, length, np.where(start == 0, 0, length - stride)


def varlen(targets: int, window: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The records' diagnostic, from 2026-04-10 on: rows of `window` targets, 32 sequences each, in which tokens attend
    within their document, cut every `window` / 32 tokens; `stride` is not used.

    Published on 8 ranks, each of which has an eighth of the whole sequences and drops what does not fill a row; so do
    eight spans of the text here, whatever the number of ranks.
    """
    length = window // VARLEN_SEQUENCES
    edges = targets // length * np.arange(VARLEN_SPANS + 1, dtype=np.int64) // VARLEN_SPANS
    rows = [np.arange(a, b - VARLEN_SEQUENCES + 1, VARLEN_SEQUENCES) for a, b in itertools.pairwise(edges)]
    start = np.concatenate(rows) * length
    return start, np.full_like(start, window), np.zeros_like(start)
