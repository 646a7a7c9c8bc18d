"""Checks that a score means what it says, made on a sample of the windows of every evaluation, by the scored path.

    sums       exp of the log probabilities of all tokens of the vocabulary, at a sampled position, sums to 1
    later      other tokens after a scored one change its log probability by nothing
    outside    another token just before a window changes nothing in it
    documents  (document-aware) other text before a document's first token changes nothing from there on

Tokens are changed where the model reads them; targets stay. A changed batch is compared with the same rows of the
unchanged one, so that the arithmetic is the same and "nothing" is bit for bit; only if scoring the same batch twice
gives two results (none of the backends used here should), differences up to ROUNDING pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from golfgpt.distributed import Ranks
from golfgpt.errors import VerificationError
from golfgpt.score.windows import SLAB_TOKENS, Batch, Read, Scorer, Windows, cut

SAMPLE = 8
"""Windows per check and rank, unless a compiled shape asks for a whole batch."""
POSITIONS = 2
"""Scored tokens per checked batch whose probabilities over the vocabulary are summed."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Nats between two runs of the same batch."""
SUM_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
"""Distance of a sum of probabilities from 1."""
REASONS = {
    "later": "depends on later tokens: the model sees ahead",
    "outside": "depends on a token before its window",
    "documents": "depends on another document: attention or a gate mixes documents (gates need model.document_start)",
}


@dataclass(frozen=True)
class Checks:
    """What was compared, and the largest difference found; for a score all are within their tolerance."""

    windows: int
    """Sampled windows."""
    comparisons: int
    """Log probabilities compared with those of changed text."""
    probability_sum_error: float
    """Distance from 1 of the sum over the vocabulary."""
    later_token_change: float
    """Nats by which tokens after a scored one changed it."""
    outside_context_change: float
    """Nats by which tokens outside a window changed a score in it."""
    other_document_change: float | None
    """Nats by which another document changed a score; None: not document-aware, or no document starts in the sample."""
    min_context: int
    """Fewest tokens that a scored token after the first window is predicted from."""
    max_context: int

    @classmethod
    def of(cls, mine: Tensor, windows: Windows, ranks: Ranks) -> Checks:
        """The worst that `check` returned on any rank."""
        everyone = ranks.all_gather(mine[None].to(ranks.device))
        sampled, compared = everyone[:, :2].sum(0).tolist()
        sums, later, outside, documents = everyone[:, 2:].max(0).values.tolist()
        documents = None if documents < 0 else documents
        fewest = int(windows.first_scored[min(1, len(windows) - 1) :].min()) + 1
        return cls(int(sampled), int(compared), sums, later, outside, documents, fewest, windows.context)

    def __str__(self) -> str:
        what, shorter = "later tokens and tokens outside the window", ""
        if self.other_document_change is not None:
            what = "later tokens, tokens outside the window and other documents"
            shorter = ", fewer where the document starts later"
        worst = max(self.later_token_change, self.outside_context_change, self.other_document_change or 0.0)
        change = f"at most {worst:.1e} nats" if worst else "nothing"
        return (
            f"checked on {self.windows} windows: probabilities sum to 1 within {self.probability_sum_error:.1e}; "
            f"{what} change {change} ({self.comparisons:,} comparisons); "
            f"{self.min_context:,} to {self.max_context:,} tokens of context{shorter}"
        )


def check(scorer: Scorer, windows: Windows, read: Read, indices: range, most: int) -> Tensor:
    """Check a sample of this rank's windows `indices`, scored `most` at a time; returns what `Checks.of` reads.

    Raises VerificationError naming the first property that does not hold and a token where it does not.
    """
    checker = _Checker(scorer, windows, read)
    sample = most if scorer.compiled else min(most, SAMPLE)
    for group, num_scored in windows.groups(indices):
        rows = sample if num_scored == windows.stride else 1
        checker.check(_spread(group, rows), num_scored)
        if scorer.document_start is not None and len(found := checker.with_documents(group)):
            checker.check(_spread(found, rows), num_scored)
    counts = len(checker.sampled), checker.compared
    return torch.tensor([*counts, *checker.worst.values()], dtype=torch.float64)


class _Checker:
    """The checks of one rank."""

    def __init__(self, scorer: Scorer, windows: Windows, read: Read):
        self.scorer, self.windows, self.read = scorer, windows, read
        self.worst = {"sums": 0.0, "later": 0.0, "outside": 0.0, "documents": -1.0}  # -1: nothing was compared
        self.sampled, self.compared = set(), 0
        self.random = torch.Generator().manual_seed(0)

    def check(self, chosen: Sequence[int], num_scored: int) -> None:
        """All checks of a batch of the windows `chosen`."""
        self.sampled |= set(map(int, chosen))
        base = self.batch(chosen, num_scored)
        place = torch.arange(self.windows.window, device=base.ids.device)
        first, count = base.scored.int().argmax(1, keepdim=True), base.scored.sum(1, keepdim=True)
        some = torch.rand(len(chosen), 1, generator=self.random).to(place.device) * (count - 1)
        last = first + some.long()  # a scored target; of two and more not the last one
        until = place <= self.windows.window - num_scored + last
        later = base._replace(ids=base.ids.where(until, self.others(base.ids)))
        outside = self.batch(chosen, num_scored, change_outside=True)
        changes = {"later": (later, base.scored & until[:, -num_scored:]), "outside": (outside, base.scored)}
        if self.scorer.document_start is not None:
            starts = (base.ids == self.scorer.document_start) & (place > 0)
            inside = place >= starts.int().argmax(1, keepdim=True)  # where none starts: everywhere
            other = base._replace(ids=base.ids.where(inside, self.others(base.ids)))
            same = base.scored & (inside & starts.any(1, keepdim=True))[:, -num_scored:]
            changes["documents"] = (other, same)
        self.compare(base, changes)

    def with_documents(self, group: range) -> np.ndarray:
        """The windows of `group` that score what follows a document's start, in the first SLAB_TOKENS of its text."""
        windows, low = self.windows, int(self.windows.start[group[0]])
        ids = self.read(low, min(low + SLAB_TOKENS, int(windows.end[group[-1]])))[0]
        starts = low + (ids == self.scorer.document_start).nonzero()[:, 0].cpu().numpy()
        index = np.searchsorted(windows.end, starts, side="right")
        inside = (group.start <= index) & (index < group.stop)
        index, starts = index[inside], starts[inside]
        return np.unique(index[starts > windows.start[index]])

    def compare(self, base: Batch, changes: dict[str, tuple[Batch, Tensor]]) -> None:
        """Raise VerificationError unless probabilities of `base` sum to 1 and its log probabilities are those of each
        changed batch at the given targets (b, s)."""
        expected, again = self.scorer(base), self.scorer(base)
        if not expected.isfinite().all():
            return  # the evaluation names the token
        allowed = 0.0 if torch.equal(expected, again) else ROUNDING[self.scorer.dtype]
        if not (apart := float((expected - again).abs().max())) <= allowed:
            raise VerificationError(
                f"scoring the same windows twice gives two results, {apart:.2g} nats apart: the model keeps state, or "
                "this machine makes errors; no score"
            )
        self.sums_to_one(base)
        for name, (changed, same) in changes.items():
            change = (self.scorer(changed) - expected).abs().where(same, 0).double().nan_to_num(nan=torch.inf)
            worst = float(change.max())
            if worst > allowed:
                token = int(changed.positions.flatten()[change.argmax()])
                raise VerificationError(
                    f"the score of token {token} of the validation text {REASONS[name]} (other tokens there change it "
                    f"by {worst:.3g} nats): no score"
                )
            if count := int(same.sum()):
                self.compared += count
                self.worst[name] = max(self.worst[name], worst)

    def sums_to_one(self, base: Batch) -> None:
        """A position's hidden states, scored with every token of the vocabulary in its place, a batch at a time."""
        hidden = self.scorer.hidden(base.ids, base.targets.size(1))
        for row, place in _spread(base.scored.nonzero().tolist(), POSITIONS):
            error = sum_error(self.scorer, hidden[row, place], base.targets.numel(), int(base.positions[row, place]))
            self.worst["sums"] = max(self.worst["sums"], error)

    def batch(self, chosen: Sequence[int], num_scored: int, *, change_outside: bool = False) -> Batch:
        """The windows `chosen`, each cut out of its text and the token before it."""
        windows, batches = self.windows, []
        for i in chosen:
            base = max(int(windows.start[i]) - 1, 0)
            slab = self.read(base, int(windows.end[i]) + 1)
            if change_outside and base < windows.start[i]:
                slab[0, 0] = self.others(slab[0, :1])[0]
            table = torch.from_numpy(windows.table[:, [i]]).to(slab.device)
            batches.append(cut(slab, base, table, windows.window, num_scored))
        return Batch(*map(torch.cat, zip(*batches, strict=True)))

    def others(self, ids: Tensor) -> Tensor:
        """Another random token in place of each."""
        vocab = self.scorer.vocab_size
        shift = torch.randint(1, max(2, vocab), ids.shape, generator=self.random).to(ids.device)
        return (ids + shift) % vocab


def sum_error(scorer: Scorer, hidden: Tensor, most: int, position: int) -> float:
    """How far the probabilities of all tokens after `hidden` (D,), `most` at a time, are from 1 in sum. Raises
    VerificationError, naming token `position` of the text, where that is more than rounding."""
    total = 0.0
    for tokens in torch.arange(scorer.vocab_size, device=hidden.device)[None].split(most, dim=1):
        repeated = hidden.expand(1, tokens.size(1), -1)
        total += float(scorer.logprobs(repeated, tokens, tokens >= 0).double().exp().sum())
    if not abs(total - 1) <= SUM_TOLERANCE[scorer.dtype]:
        raise VerificationError(
            f"the probabilities over the vocabulary sum to {total:.6g}, not 1, for token {position} of the validation "
            "text: no score"
        )
    return abs(total - 1)


def _spread(items: Sequence, count: int) -> list:
    """`count` items from first to last, evenly; repeated where there are fewer."""
    return [items[(len(items) - 1) * i // max(count - 1, 1)] for i in range(count)]
