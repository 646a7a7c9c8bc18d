"""Which targets are scored in which window, and the one path by which they are: evaluation and its checks share it.

Target t of a text is the token after position t, so every token but the first is a target. Three int64 arrays hold the
windows of a rule: each reads `length` tokens from `start` on and scores its targets from offset `first_scored` to its
end. Log probabilities are computed for the last S targets of a window only, or for all L if it scores earlier ones (the
first window, and the short ones of R4b). So there are at most two shapes.

`score_windows` alone owns the order: the tokens of many windows, a slab, go to the device at once, batches are cut out
of it there, and each is scored before the next one is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from golfgpt_kernels import token_logprobs
from torch import Tensor

from golfgpt.data.orders import boundaries
from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT, Weights
from golfgpt.model.linear import Weight
from golfgpt.model.segments import Segments
from golfgpt.published.windows import VARLEN_SEQUENCES, r4, r4b, varlen

SLAB_TOKENS = 1 << 20
"""Tokens on the device at a time: 16 MiB with their byte counts."""

Read = Callable[[int, int], Tensor]
"""read(start, stop) -> int64 (2, stop - start) on the device: tokens of the text, and their bytes."""


def every_token(targets: int, window: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length and first_scored (as in `golfgpt.published.windows`) of windows that score each target once.

    Windows start at 0, S, 2S, …; the last is shifted back to end with the text. The first scores all its targets, each
    later one those that no earlier window scored.
    """
    start = np.arange(0, targets - window + stride, stride, dtype=np.int64).clip(max=targets - window)
    end = start + window
    return start, np.full_like(start, window), np.append(0, end[:-1]) - start


RULES = {"every_token": every_token, "r4": r4, "r4b": r4b, "varlen": varlen}


class Windows:
    """The n windows of `rule` over `targets` targets, L = `window` tokens long and S = `stride` <= L apart.

    Raises InputError for a window longer than the text, and for a rule that drops all of it.
    """

    def __init__(self, targets: int, window: int, stride: int, rule: str = "every_token"):
        if window > targets and rule != "varlen":
            raise InputError(
                f"eval.window {window} is longer than the {targets} tokens to score; choose a smaller window, or more "
                "tokens (another text, a larger eval.max_tokens)"
            )
        self.targets, self.window, self.stride, self.rule = targets, window, stride, rule
        self.table = np.stack(RULES[rule](targets, window, stride))  # (3, n)
        if not len(self):
            raise InputError(
                f"eval.rule {rule} drops all {targets:,} targets: an eighth of them fills no row of {window:,}; "
                "choose a smaller eval.window or another rule"
            )
        self.start, self.length, self.first_scored = self.table
        self.context = window // VARLEN_SEQUENCES if rule == "varlen" else window
        """Most tokens that a target is predicted from."""
        self.begin, self.end = self.start + self.first_scored, self.start + self.length  # of the scored targets

    def __len__(self) -> int:
        return self.table.shape[1]

    def groups(self, indices: range) -> Iterator[tuple[range, int]]:
        """Consecutive windows among `indices`, in at most three groups (the first, other full ones, short ones), each
        with the number of targets, the last of a window, that log probabilities are computed for."""
        whole_first = int(self.first_scored[0] < self.window - self.stride)
        edges = (0, whole_first, int((self.length == self.window).sum()), len(self))
        sizes = (self.window, self.stride, self.window)
        for (low, high), num_scored in zip(pairwise(edges), sizes, strict=True):
            if group := range(max(low, indices.start), min(high, indices.stop)):
                yield group, num_scored

    def coverage(self) -> list[tuple[range, int]]:
        """Runs of targets and how often each of a run is scored, in order; targets that are not scored are left out.

        A difference array over the targets, +1 where a window's scored targets begin and -1 where they end, summed up;
        kept only where it is not zero, so it is as long as there are windows, not targets.
        """
        edges, where = np.unique(np.concatenate((self.begin, self.end)), return_inverse=True)
        change = np.bincount(where, np.repeat((1, -1), len(self))).astype(np.int64)
        edges, change = edges[change != 0], change[change != 0]
        runs = zip(pairwise(edges.tolist()), np.cumsum(change)[:-1].tolist(), strict=True)
        return [(range(low, high), times) for (low, high), times in runs if times]

    def num_targets(self, indices: range) -> int:
        """Targets that the windows `indices` score, counted as often as they are scored."""
        return int((self.end - self.begin)[indices.start : indices.stop].sum())


class Batch(NamedTuple):
    """b windows of L tokens and the last s targets of each."""

    ids: Tensor
    """(b, L)"""
    targets: Tensor
    """(b, s)"""
    nbytes: Tensor
    """(b, s): bytes of the targets."""
    scored: Tensor
    """(b, s): whether the target is scored in this window."""
    positions: Tensor
    """(b, s): of the targets among all tokens of the text."""


def cut(slab: Tensor, base: int, table: Tensor, window: int, num_scored: int) -> Batch:
    """Windows table (3, b) with their last `num_scored` targets, out of slab (2, n), the text from token `base` on.

    A short window is filled up with the last token of the slab: what follows a token does not change its score.
    """
    start, length, first_scored = table[..., None]
    offsets = torch.arange(window + 1, device=slab.device)
    positions = (start + offsets).clamp(max=base + slab.size(1) - 1)
    ids, nbytes = slab[:, positions - base]
    offsets = offsets[-num_scored - 1 : -1]
    scored = (offsets >= first_scored) & (offsets < length)
    return Batch(ids[:, :-1], ids[:, -num_scored:], nbytes[:, -num_scored:], scored, positions[:, -num_scored:])


class Scorer:
    """Log probabilities of tokens: hidden states are the model's, the softmax over the vocabulary is not."""

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype,
        *,
        document_start: int | None = None,
        longest: int | None = None,
        compiled: bool = False,
        varied: bool = False,
    ) -> None:
        """With `document_start` tokens attend within their document only, and with `longest` within pieces of so many
        tokens of it; then a batch is one row. `varied`: batches have many shapes, and one compiled form serves all
        lengths."""
        self.longest, self.varied = longest, varied
        self.dtype, self.document_start, self.compiled = dtype, document_start, compiled
        self.vocab_size = model.config.vocab_size
        self.softcap = model.config.logit_softcap
        self._logits = model.logits
        self._model = torch.compile(model, dynamic=None if varied else False, fullgraph=True) if compiled else model
        self.use(None, model.head_weight.to(dtype))

    def use(self, weights: Weights | None, head: Weight) -> None:
        """Score with these weights from now on, both in `dtype`; None: the model's."""
        self.weights, self.head_weight = weights, head

    def hidden(self, ids: Tensor, num_scored: int) -> Tensor:
        """(b, L) -> (b, num_scored, D)."""
        if self.longest:
            edges = torch.from_numpy(boundaries(ids[0].cpu().numpy(), self.document_start, self.longest))
            segments = Segments.of(edges.to(ids.device), ids.size(1), self.longest, self.dtype)
            return self._model(ids, dtype=self.dtype, weights=self.weights, segments=segments)
        suffix = None if num_scored == ids.size(1) else num_scored

        def forward() -> Tensor:
            return self._model(
                ids, dtype=self.dtype, weights=self.weights, suffix=suffix, document_start=self.document_start
            )

        return call_varied(forward, [(ids, 1)]) if self.compiled and self.varied else forward()

    def logprobs(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """(b, s, D), (b, s), (b, s) -> (b, s) fp32 in nats, 0 where not mask. The fused op has no gradient and takes a
        plain matrix."""
        if isinstance(self.head_weight, Tensor) and not torch.is_grad_enabled():
            return token_logprobs(hidden, self.head_weight, targets, softcap=self.softcap, mask=mask)
        everything = self._logits(hidden, self.head_weight).log_softmax(-1)
        return everything.gather(-1, targets[..., None])[..., 0].where(mask, 0)

    def __call__(self, batch: Batch) -> Tensor:
        """Log probabilities (b, s) of the scored targets."""
        return self.logprobs(self.hidden(batch.ids, batch.targets.size(1)), batch.targets, batch.scored)


def call_varied(compiled: Callable[[], Tensor], varies: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Call what is `compiled` with one form for all sizes of the given dimensions of its inputs."""
    for tensor, dim in varies:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    # Others: suffix or not, gradients or not, one row, as many as at first, or any number; those of the checks too.
    with torch._dynamo.config.patch(recompile_limit=64):
        return compiled()


def score_windows(
    scorer: Scorer, read: Read, windows: Windows, indices: range, most: int
) -> Iterator[tuple[int, Batch, Tensor]]:
    """Score the windows `indices`, `most` at a time; yields (index of the next window, batch, log probabilities)."""
    for stop, batch in batches(read, windows, indices, most):
        yield stop, batch, scorer(batch)


def batches(read: Read, windows: Windows, indices: range, most: int) -> Iterator[tuple[int, Batch]]:
    """What `score_windows` scores, in its order."""
    for group, num_scored in windows.groups(indices):
        rows = most if num_scored == windows.stride else 1
        many = rows * max(1, (SLAB_TOKENS - windows.window) // (windows.stride * rows))
        for chunk in (group[i : i + many] for i in range(0, len(group), many)):
            base = int(windows.start[chunk[0]])
            slab = read(base, int(windows.end[chunk[-1]]) + 1)
            table = torch.from_numpy(windows.table[:, chunk.start : chunk.stop]).to(slab.device)
            for low in range(0, len(chunk), rows):
                index = torch.arange(low, low + rows, device=slab.device)
                batch = cut(slab, base, table[:, index.clamp(max=len(chunk) - 1)], windows.window, num_scored)
                batch = batch._replace(scored=batch.scored & (index < len(chunk))[:, None])
                yield min(chunk[0] + low + rows, chunk.stop), batch
