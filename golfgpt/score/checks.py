"""Checks that a score means what it says, made on a sample of the windows of every evaluation, by the scored path.

    normalized   exp of the log probabilities of all tokens of the vocabulary, at a sampled position, sums to 1
    causal       other tokens behind a scored one change its log probability by nothing
    context      another token just outside a window changes nothing in it
    documents    (document-aware) other text before a document's first token changes nothing from there on

Tokens are changed where the model reads them; targets stay. A changed batch is compared with the same rows of the
unchanged one, so that the arithmetic is the same and "nothing" is bit for bit; only where scoring the same batch
twice gives two results (none of the backends used here should), differences up to ROUNDING are let pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from golfgpt.distributed import Ranks
from golfgpt.errors import VerificationError
from golfgpt.score.windows import SLAB_TOKENS, Cut, Read, Scorer, Windows, cut

SAMPLE = 8
"""Windows per check and rank, where no compiled shape asks for a whole batch."""
POSITIONS = 2
"""Scored tokens whose probabilities over the vocabulary are summed, per shape and rank."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Nats between two runs of the same batch."""
SUM_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
"""Distance of a sum of probabilities from 1."""


@dataclass(frozen=True)
class Checks:
    """What was compared, and the largest difference found; for a score all are within their tolerance."""

    windows: int
    """Sampled windows."""
    comparisons: int
    """Log probabilities compared with those of changed text."""
    probability_sum_error: float
    """Of the sum over the vocabulary from 1."""
    later_token_change: float
    """Nats by which tokens behind a scored one changed it."""
    outside_context_change: float
    """Nats by which tokens outside a window changed a score in it."""
    other_document_change: float | None
    """Nats by which another document changed a score; None: not document-aware, or no document starts in the
    sample."""
    min_context: int
    """Fewest tokens that a scored token behind the first window is predicted from."""
    max_context: int

    @classmethod
    def of(cls, mine: Tensor, windows: Windows, ranks: Ranks) -> Checks:
        """The worst that `check` returned on any rank."""
        everyone = ranks.all_gather(mine[None].to(ranks.device))
        sampled, compared = everyone[:, :2].sum(0).tolist()
        sums, later, outside, documents = everyone[:, 2:].max(0).values.tolist()
        return cls(
            windows=int(sampled),
            comparisons=int(compared),
            probability_sum_error=sums,
            later_token_change=max(later, 0.0),
            outside_context_change=max(outside, 0.0),
            other_document_change=None if documents < 0 else documents,
            min_context=windows.context[0],
            max_context=windows.context[1],
        )

    def __str__(self) -> str:
        what = ["later tokens", "tokens outside the window"]
        what += ["other documents"] if self.other_document_change is not None else []
        worst = max(self.later_token_change, self.outside_context_change, self.other_document_change or 0.0)
        return (
            f"checked on {self.windows} windows: probabilities sum to 1 within {self.probability_sum_error:.1e}; "
            f"{', '.join(what[:-1])} and {what[-1]} change {'nothing' if worst == 0 else f'at most {worst:.1e} nats'}"
            f" ({self.comparisons:,} comparisons); {self.min_context:,} to {self.max_context:,} tokens of context"
            f"{'' if self.other_document_change is None else ', fewer where the document starts later'}"
        )


def check(scorer: Scorer, windows: Windows, read: Read, indices: range, batch: int) -> Tensor:
    """Check a sample of this rank's windows `indices`; `batch` is the scored shape. Returns what `Checks.of` reads.

    Raises VerificationError naming the first property that does not hold and a token where it does not.
    """
    check = _Check(scorer, windows, read)
    edges = (0, int(windows.suffix(0) != windows.stride), windows.full, len(windows))  # first, full, short windows
    groups = (range(max(low, indices.start), min(high, indices.stop)) for low, high in pairwise(edges))
    for group in filter(len, groups):
        rows = 1 if windows.suffix(group[0]) != windows.stride else batch if scorer.compiled else min(batch, SAMPLE)
        check.sample(group, rows)
        if scorer.document_start is not None:
            check.documents(group, rows)
    return torch.tensor([check.sampled, check.compared, *check.found.values()], dtype=torch.float64)


class _Check:
    """The checks of one rank."""

    def __init__(self, scorer: Scorer, windows: Windows, read: Read):
        self.scorer, self.windows, self.read = scorer, windows, read
        self.found = dict.fromkeys(("sums", "later", "outside", "documents"), -1.0)  # -1: nothing was compared
        self.sampled = self.compared = 0
        self.random = torch.Generator().manual_seed(0)

    def sample(self, group: range, rows: int) -> None:
        """Normalization, causality and context on `rows` windows spread over `group`."""
        chosen = _spread(group, rows)
        self.sampled += len(set(chosen))
        base = self.cut(chosen)
        device, window, suffix = base.ids.device, self.windows.window, base.targets.size(1)
        expected, allowed = self.twice(base)
        if not expected.isfinite().all():
            return  # the evaluation names the token

        self.sums_to_one(base)
        places = torch.arange(suffix, device=device)
        first, count = base.scored.int().argmax(1, keepdim=True), base.scored.sum(1, keepdim=True)
        some = torch.rand(rows, 1, generator=self.random).to(device) * (count - 1)
        kept = first + 1 + some.long()  # of the suffix; a scored token at least, and of two and more not the last
        later = torch.arange(window, device=device) >= window - suffix + kept
        got = self.scorer(base.ids.where(~later, self.others(base.ids)), base.targets, base.scored)
        same = base.scored & (places < kept)
        self.compare("later", expected, got, same, base, allowed, "depends on tokens behind it: the model sees ahead")

        outside = self.cut(chosen, change_outside=True)
        got = self.scorer(outside.ids, outside.targets, outside.scored)
        self.compare("outside", expected, got, base.scored, base, allowed, "depends on a token in front of its window")

    def documents(self, group: range, rows: int) -> None:
        """Text before a document's start changes nothing after it."""
        low = int(self.windows.start(torch.tensor(group[0])))
        scored = self.windows.scored(group)
        ids = self.read(low, min(low + SLAB_TOKENS, scored.stop))[0]
        starts = low + (ids == self.scorer.document_start).nonzero()[:, 0]
        begins = [(self.windows.scoring(t), t) for t in starts.tolist() if t in scored]
        begins = [(i, t - int(self.windows.start(torch.tensor(i)))) for i, t in begins if i in group]
        begins = [(i, offset) for i, offset in begins if offset > 0]
        if not begins:
            return
        begins = [begins[i] for i in _spread(range(len(begins)), rows)]
        base = self.cut([i for i, _ in begins])
        window, suffix = base.ids.size(1), base.targets.size(1)
        offset = torch.tensor([[offset] for _, offset in begins], device=base.ids.device)
        place = torch.arange(window, device=base.ids.device)
        expected, allowed = self.twice(base)
        if not expected.isfinite().all():
            return
        got = self.scorer(base.ids.where(place >= offset, self.others(base.ids)), base.targets, base.scored)
        same = base.scored & (place[-suffix:] >= offset)
        reason = "depends on another document: attention or a gate mixes documents (gates need model.document_start)"
        self.compare("documents", expected, got, same, base, allowed, reason)

    def sums_to_one(self, base: Cut) -> None:
        """A position's hidden states, scored with every token of the vocabulary in its place."""
        rows, suffix = base.targets.shape
        hidden = self.scorer.hidden(base.ids, suffix)
        known = base.scored.nonzero().tolist()
        for row, place in (known[i] for i in _spread(range(len(known)), POSITIONS)):
            repeated = hidden[row, place].expand(rows, suffix, -1)
            total = 0.0
            for low in range(0, self.scorer.vocab_size, rows * suffix):
                tokens = torch.arange(low, low + rows * suffix, device=hidden.device).view(rows, suffix)
                real = tokens < self.scorer.vocab_size
                logprobs = self.scorer.logprobs(repeated, tokens.where(real, 0), real)
                total += float((logprobs.double().exp() * real).sum())
            error = abs(total - 1)
            if not error <= SUM_TOLERANCE[self.scorer.dtype]:
                raise VerificationError(
                    f"the probabilities over the vocabulary sum to {total:.6g}, not 1, for token "
                    f"{int(base.positions[row, place])} of the validation text: no score"
                )
            self.found["sums"] = max(self.found["sums"], error)

    def compare(
        self, name: str, expected: Tensor, got: Tensor, same: Tensor, base: Cut, allowed: float, reason: str
    ) -> None:
        """Raise VerificationError unless expected and got are the same where `same`."""
        change = (got - expected).abs().where(same, 0).double().nan_to_num(nan=torch.inf)
        worst = float(change.max())
        if worst > allowed:
            row, place = divmod(int(change.argmax()), change.size(1))
            raise VerificationError(
                f"the score of token {int(base.positions[row, place])} of the validation text {reason} (other tokens "
                f"there change it by {worst:.3g} nats): no score"
            )
        if count := int(same.sum()):
            self.compared += count
            self.found[name] = max(self.found[name], worst)

    def twice(self, base: Cut) -> tuple[Tensor, float]:
        """Log probabilities of a batch, and the difference that rounding may make to them."""
        one, two = (self.scorer(base.ids, base.targets, base.scored) for _ in range(2))
        if torch.equal(one, two) or not one.isfinite().all():
            return one, 0.0
        allowed = ROUNDING[self.scorer.dtype]
        if not (one - two).abs().max() <= allowed:
            raise VerificationError("scoring the same windows twice gives two results: the model keeps state; no score")
        return one, allowed

    def cut(self, chosen: list[int], *, change_outside: bool = False) -> Cut:
        """A batch of the windows `chosen`, cut out of their text and the token in front of it."""
        cuts = []
        for i in chosen:
            start = int(self.windows.start(torch.tensor(i)))
            base = max(start - 1, 0)
            slab = self.read(base, min(start + self.windows.window, self.windows.targets) + 1)
            if change_outside and base < start:
                slab[0, 0] = self.others(slab[0, :1])[0]
            index = torch.tensor([i], device=slab.device)
            cuts.append(cut(slab, base, self.windows, index, self.windows.suffix(i)))
        return Cut(*map(torch.cat, zip(*cuts, strict=True)))

    def others(self, ids: Tensor) -> Tensor:
        """Another random token in place of each."""
        vocab = self.scorer.vocab_size
        shift = torch.randint(1, max(2, vocab), ids.shape, generator=self.random).to(ids.device)
        return (ids + shift) % vocab


def _spread(items: range, count: int) -> list[int]:
    """`count` items from first to last, evenly; repeated where there are fewer."""
    return [items[(len(items) - 1) * i // max(count - 1, 1)] for i in range(count)]
