"""Whether an adapted score keeps the four conditions that the contest asks for (openai/parameter-golf, issue #1017).

    causal          tokens after a scored one change its log probability by nothing, adapters included
    distribution    probabilities over the vocabulary sum to 1, with the weights of then
    before          each token is scored before it is learned          by the ledger of the evaluation
    single pass     each token is scored once                          by the ledger of the evaluation

The first two are checked on a sample before every evaluation, by the same loop and an adapter made alike: a short plan
is scored again and again with other tokens from some place on. What stands at that place itself is exchanged too, but
still scored as it was: so neither the adapter nor a gate may know a token that is scored next. BOS stays BOS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from golfgpt.config import TTTConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import NonFiniteError, VerificationError
from golfgpt.model.linear import LoRA
from golfgpt.score.checks import ROUNDING, sum_error
from golfgpt.score.ttt.adapter import Adapter, Step, run, targets_of
from golfgpt.score.ttt.ledger import Ledger
from golfgpt.score.ttt.plan import Document
from golfgpt.score.windows import Batch, Scorer

SAMPLE = 8
"""Documents in each of the two batches of the sample."""
CHUNKS = 3
"""Of each sampled document, and of the sampled text."""


_CHANGES = {
    "yes": "no document changes another one's score",
    "by phase": "documents of earlier phases change the scores of later ones",
    "no": "earlier text changes the scores of later text",
}
_ORDERS = {"stream": "in the order of the text", "length": "by length of the documents"}


@dataclass(frozen=True)
class Compliance:
    """The conditions, and what was found."""

    later_token_change: float
    """Nats by which later tokens changed an earlier score; at most rounding."""
    comparisons: int
    """Log probabilities that were compared with those of changed text."""
    probability_sum_error: float
    """Distance from 1 of the sum over the vocabulary."""
    scored_once: int
    """Tokens scored, each once."""
    learned_after_scored: int
    """Tokens learned, each after it was scored."""
    documents_independent: str
    """yes: no document changes another one's score. by phase: documents of earlier phases do. no."""
    other_document_change: float | None
    """Nats by which another document changed a score; None where it may, or there is only one."""
    order: str
    """stream or length."""
    code_length: str
    """Whether exp(-nats) is the probability of the text as it stands, in words."""

    def __str__(self) -> str:
        worst = max(self.later_token_change, self.other_document_change or 0.0)
        change = f"at most {worst:.1e} nats" if worst else "nothing"
        others = "" if self.other_document_change is None else " and other documents"
        return (
            f"checked: later tokens{others} change {change} ({self.comparisons:,} comparisons); probabilities sum to 1 "
            f"within {self.probability_sum_error:.1e}; by the ledger {self.scored_once:,} tokens are scored once and "
            f"{self.learned_after_scored:,} learned afterwards\n"
            f"{_CHANGES[self.documents_independent]}; scored {_ORDERS[self.order]}; the score is {self.code_length}"
        )


def independence(ttt: TTTConfig) -> str:
    """`Compliance.documents_independent` of these settings."""
    if ttt.kind == "sgd" or ttt.lora.warm:
        return "no"
    return "yes" if ttt.kind == "lora" else "by phase"


def code_length(ttt: TTTConfig) -> tuple[bool, str]:
    """Whether the product of the conditionals is a code length of the text in its order, and why."""
    if ttt.kind == "sgd":
        return True, "a code length of the text: weights learn in its order"
    if independence(ttt) == "yes":
        return True, "a code length of the text: each document depends on itself alone"
    if ttt.lora.order == "stream":
        return True, "a code length of the text: weights learn from documents that stand before"
    return False, (
        "not a code length of the text: weights carry over between documents that are scored by length; it is one "
        "of the documents in that order, without the order itself"
    )


class Sample:
    """A short plan over a text of its own, scored with changed text by adapters that are made alike."""

    def __init__(
        self,
        scorer: Scorer,
        steps: Callable[[Ranks], Iterable[Step]],
        make: Callable[[Ranks], Adapter],
        text: Tensor,
        origin: np.ndarray,
        document_start: int,
    ):
        """`text` (2, n): tokens and bytes, which stand at `origin` (n,) in the validation text. Raises
        VerificationError where scoring twice gives two results."""
        self.scorer, self.steps, self.make, self.text, self.origin = scorer, steps, make, text, origin
        self.document_start, self.alone = document_start, Ranks(0, 1, text.device)
        self.targets, self.comparisons, self.sums = len(origin) - 1, 0, [0.0]
        self.plain = self._scores(text, sums=True)
        difference = np.nan_to_num(np.abs(self._scores(text) - self.plain)).max()
        # Sums of gradients on a GPU have no fixed order, and may be equal twice by chance.
        self.allowed = ROUNDING[scorer.dtype] if difference or text.is_cuda else 0.0
        if difference > self.allowed:
            raise VerificationError(
                "adapting to the same text twice gives two results: something keeps state; no score"
            )

    def check(
        self, before: Sequence[Document], after: Sequence[Document], chunk: int, *, independent: bool
    ) -> dict[str, float | int | None]:
        """Fields of `Compliance`, where the plan scores the documents `before`, then `after` (a text in windows is
        one), by chunks of `chunk` targets. Other tokens in `after`, from their second chunk on and from the middle of
        their last one on; if documents are to be `independent`, in `before` and in every other one of `after`."""
        whole, later, other = [_targets(d, d.length - 1) for d in before], 0.0, None
        for back in (None, chunk // 2):
            firsts = [min(chunk, d.length - 2) if back is None else max(0, d.length - 2 - back) for d in after]
            changed = [range(d.start + i + 1, d.start + d.length) for d, i in zip(after, firsts, strict=True)]
            same = [_targets(d, i + 1) for d, i in zip(after, firsts, strict=True)]
            why = "depends on later tokens: the adapter or the model reads ahead"
            later = max(later, self._change(changed, [part.start for part in changed], whole + same, why))
        if independent and (others := [*before, *after[1::2]]):
            changed = [range(d.start + 1, d.start + d.length) for d in others]
            same = [_targets(d, d.length - 1) for d in after[::2]]
            other = self._change(changed, [], same, "depends on another document")
        return {
            "later_token_change": later,
            "comparisons": self.comparisons,
            "probability_sum_error": max(self.sums),
            "other_document_change": other,
        }

    def _change(self, changed: Sequence[range], kept: Sequence[int], same: Sequence[range], why: str) -> float:
        """The most by which other tokens in the runs `changed` change the scores of the targets `same`, those of the
        tokens `kept` being scored as they were. Raises VerificationError where that is more than rounding."""
        ids, vocab = self.text[0], self.scorer.vocab_size
        other = (ids + 1 + torch.arange(len(ids), device=ids.device) * 7919 % max(1, vocab - 1)) % vocab
        other = torch.where(other == self.document_start, (other + 1) % vocab, other)
        inside = torch.from_numpy(_covered(changed, len(ids))).to(ids.device) & (ids != self.document_start)
        scores = self._scores(torch.stack((torch.where(inside, other, ids), self.text[1])), kept)
        change = np.where(_covered(same, self.targets), np.abs(scores - self.plain), np.nan)
        self.comparisons += int((~np.isnan(change)).sum())
        change = np.nan_to_num(change)
        if change.max() > self.allowed:
            raise VerificationError(
                f"with test-time training the score of token {self.origin[change.argmax() + 1]} of the validation text "
                f"{why} (other tokens there change it by {change.max():.3g} nats): no score"
            )
        return float(change.max())

    def _scores(self, text: Tensor, kept: Sequence[int] = (), sums: bool = False) -> np.ndarray:
        """Log probability of each target, NaN where it is not scored, and from where weights diverge."""
        out, ledger, adapter = np.full(self.targets, np.nan), Ledger(self.targets), self.make(self.alone)
        places = torch.tensor(list(kept), dtype=torch.int64, device=text.device)

        def put_back(batch: Batch) -> Batch:
            targets = self.text[0][batch.positions].where(torch.isin(batch.positions, places), batch.targets)
            return batch._replace(targets=targets)

        def read(start: int, stop: int) -> Tensor:
            return text[:, start:stop]

        steps = self.steps(self.alone)
        with contextlib.suppress(NonFiniteError):
            for batch, logprobs in run(steps, self.scorer, adapter, ledger, read, self.alone, swap=put_back):
                out[targets_of(batch)] = logprobs[batch.scored].double().cpu().numpy()
                if sums:
                    self.sums.append(self._sum_error(batch))
        return out

    @torch.no_grad()
    def _sum_error(self, batch: Batch) -> float:
        """Of the last scored target of the batch."""
        scorer, (row, place) = self.scorer, batch.scored.nonzero()[-1].tolist()
        hidden = scorer.hidden(batch.ids, batch.targets.size(1))[row, place]
        weights, head = scorer.weights, scorer.head_weight
        if isinstance(head, LoRA):
            scorer.use(weights, LoRA(head.w, head.a[row : row + 1], head.b[row : row + 1]))
        error = sum_error(scorer, hidden, batch.targets.numel(), int(self.origin[int(batch.positions[row, place])]))
        scorer.use(weights, head)
        return error


def _targets(document: Document, count: int) -> range:
    return range(document.start, document.start + count)


def _covered(runs: Sequence[range], length: int) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    for part in runs:
        mask[part.start : part.stop] = True
    return mask
