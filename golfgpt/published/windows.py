"""The windows of two published scoring rules, which score every token but the first of the text not exactly once.

Both return what `golfgpt.score.windows.every_token` does, as int64 arrays (n,) for n windows over `targets` targets:

    start          first token that the window reads
    length         tokens that it reads
    first_scored   offset in it of the first target that it scores; it scores all from there on
"""

from __future__ import annotations

import numpy as np


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
