"""The ledger of an adapted score: for each target the moment at which it was scored, and at which it was first learned.

Moments are numbers that rise with every batch that is scored and every text that is learned. On several ranks each has
its own, and where they learn from each other's tokens they agree on the largest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from golfgpt.distributed import Ranks
from golfgpt.errors import VerificationError

NEVER = -1


class Ledger:
    """Of `targets` targets, target t being token t + 1 of the text; 9 bytes each."""

    def __init__(self, targets: int):
        self.scored, self.learned = (np.full(targets, NEVER, dtype=np.int32) for _ in range(2))
        self._shared = np.zeros(targets, dtype=bool)
        self._moment = 0

    def score(self, targets: np.ndarray) -> None:
        """Targets (n,) are scored now. Raises VerificationError if one was already."""
        again = targets[self.scored[targets] != NEVER]
        if not len(again) and len(np.unique(targets)) < len(targets):
            values, counts = np.unique(targets, return_counts=True)
            again = values[counts > 1]
        if len(again):
            raise VerificationError(f"token {again[0] + 1} of the validation text is scored a second time: no score")
        self.scored[targets] = self._tick()

    def learn(self, targets: np.ndarray) -> None:
        """Targets (n,) are learned now. Raises VerificationError if one is not scored yet."""
        early = targets[self.scored[targets] == NEVER]
        if len(early):
            raise VerificationError(
                f"token {early[0] + 1} of the validation text would be learned before it is scored: no score"
            )
        self.learned[targets[self.learned[targets] == NEVER]] = self._tick()

    def learn_runs(self, runs: Sequence[range]) -> None:
        """All tokens of each run are learned now, but the first, which only stands before them. Of a document that is
        BOS: the constant that every document starts with."""
        self.learn(np.concatenate([np.arange(run.start, run.stop - 1) for run in runs]))

    def _tick(self) -> int:
        self._moment += 1
        return self._moment - 1

    def share(self, ranks: Ranks, runs: Sequence[range]) -> None:
        """Take over what other ranks scored among the targets from the first to the last of `runs`. Every rank must
        call it. Raises VerificationError for a target that two of them scored."""
        if ranks.world == 1:
            return
        part = slice(min(run.start for run in runs), max(run.stop for run in runs) - 1)
        mine = np.where(self._shared[part], NEVER, self.scored[part]) + 1
        both = torch.from_numpy(np.stack((mine, mine > 0)).astype(np.int64)).to(ranks.device)
        moments, counts = ranks.sum_(both).cpu().numpy()
        if (twice := np.flatnonzero(counts > 1)).size:
            token = part.start + twice[0] + 1
            raise VerificationError(f"token {token} of the validation text is scored by two ranks: no score")
        found = counts > 0
        self.scored[part][found] = moments[found] - 1
        self._shared[part] |= found
        moment = torch.tensor([self._moment], device=ranks.device)
        self._moment = int(ranks.all_gather(moment).max())

    def merge(self, ranks: Ranks) -> None:
        """Make it the same on every rank, at the end."""
        if ranks.world == 1:
            return
        self.share(ranks, [range(0, len(self.scored) + 1)])
        for low in range(0, len(self.learned), 1 << 20):
            part = self.learned[low : low + (1 << 20)]
            everyone = ranks.all_gather(torch.from_numpy(part)[None].to(ranks.device)).cpu().numpy()
            first = np.where(everyone == NEVER, np.iinfo(np.int32).max, everyone).min(0)
            part[:] = np.where((everyone == NEVER).all(0), NEVER, first)

    def check(self, *, all_scored: bool) -> None:
        """Raises VerificationError naming a token that was learned, but not scored before, and with `all_scored` one
        that was never scored."""
        wrong = (self.learned != NEVER) & ((self.scored == NEVER) | (self.learned <= self.scored))
        missing = (self.scored == NEVER) & all_scored
        for tokens, what in ((wrong, "was learned before it was scored"), (missing, "was never scored")):
            if tokens.any():
                raise VerificationError(f"token {tokens.argmax() + 1} of the validation text {what}: no score")

    @property
    def digest(self) -> str:
        """SHA-256 of both columns, little-endian int32, -1 for never."""
        columns = (self.scored, self.learned)
        return hashlib.sha256(b"".join(column.astype("<i4").tobytes() for column in columns)).hexdigest()
