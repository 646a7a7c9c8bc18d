"""Which tokens are scored in which window, and the one path by which they are: evaluation and its checks share it.

The text is one stream of N tokens; token 0 has no context and is no target, the other N - 1 are. A window reads L
tokens and is asked for the log probabilities of its last few targets, so the model gives hidden states of that suffix
only. All windows have the same suffix, S, but the first, whose L targets nobody else scores, and the short windows of
R4b, scored in its shape: there are at most two shapes. Batches are filled up with repeats of their last window,
unscored.

The tokens of many windows, a slab, go to the device at once, and a batch is cut out of them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from golfgpt_kernels import token_logprobs
from torch import Tensor

from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT

SLAB_TOKENS = 1 << 20
"""Tokens on the device at a time: 16 MiB with their byte counts."""

Read = Callable[[int, int], Tensor]
"""read(start, stop) -> int64 (2, stop - start) on the device: tokens of the text, and their bytes."""


@dataclass(frozen=True)
class Windows:
    """All windows over `targets` targets; window i reads tokens start(i) .. start(i) + window - 1, and target t is the
    token after position t.

    Windows start at 0, S, 2S, …; the last is shifted back to end with the text. The first scores all its targets, each
    later one those that no earlier window scored. Raises InputError for a window longer than the text, a stride of 0
    or beyond the window.

    Variants of published recipes. `r4`: full windows only, and each, the first included, scores its last S targets.
    `r4b`: windows go on while S targets are left, the last ones shorter than L, and each but the first scores its
    last S: those of the text are scored again by every short window.
    """

    targets: int
    window: int
    stride: int
    r4: bool = False
    r4b: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise InputError(f"eval.stride must lie in 1..{self.window} (the window), got {self.stride}")
        if self.window > self.targets:
            raise InputError(
                f"eval.window {self.window} is longer than the text's {self.targets} target tokens; "
                "choose a smaller window"
            )

    def __len__(self) -> int:
        rest = self.targets - self.window
        if self.r4b:
            return self.targets // self.stride
        return 1 + (rest // self.stride if self.r4 else -(-rest // self.stride))

    @property
    def full(self) -> int:
        """Windows of L tokens; those of r4b behind them are shorter."""
        return 1 + (self.targets - self.window) // self.stride if self.r4b else len(self)

    def start(self, index: Tensor) -> Tensor:
        """First token of each window."""
        return (index * self.stride).clamp(max=self.targets - (self.stride if self.r4b else self.window))

    def length(self, index: Tensor) -> Tensor:
        """Tokens of each window: L, or what is left of the text."""
        return (self.targets - self.start(index)).clamp(max=self.window)

    def first_scored(self, index: Tensor) -> Tensor:
        """Offset inside each window of the first target that it scores; it scores all from there on."""
        later = (index - 1) * self.stride + self.window - self.start(index)
        if self.r4b:
            later = self.length(index) - self.stride
        return later if self.r4 else torch.where(index == 0, 0, later)

    def suffix(self, index: int) -> int:
        """Targets that the log probabilities of window `index` are computed for; those of a short one lie anywhere."""
        return self.stride if self.r4 or 0 < index < self.full else self.window

    def scored(self, windows: range) -> range:
        """The targets that consecutive windows score, consecutive too."""
        if self.full <= windows.start < windows.stop:
            return range(self.targets - self.stride, self.targets)
        skipped = self.window - self.stride

        def before(index: int) -> int:
            return min(index * self.stride + skipped, self.targets) if index or self.r4 else 0

        return range(before(windows.start), before(windows.stop))

    def counts(self, windows: range) -> list[tuple[range, int]]:
        """The targets that consecutive windows score, and how often."""
        short = len(range(max(windows.start, self.full), windows.stop))
        parts = [(self.scored(range(windows.start, windows.stop - short)), 1)]
        return parts + [(self.scored(windows[-1:]), short)] * (short > 0)

    def scoring(self, target: int) -> int:
        """The window that scores `target`, which is one that is scored."""
        return max(0, (target - self.window) // self.stride + 1)

    @property
    def context(self) -> tuple[int, int]:
        """Fewest and most tokens that a scored token is predicted from; the fewest are those behind the first window,
        whose own targets have 1 and up."""
        fewest = self.first_scored(torch.tensor([min(1, len(self) - 1), len(self) - 1])).min()
        return int(fewest) + 1, self.window


class Cut(NamedTuple):
    """A batch of b windows of L tokens and their last s targets."""

    ids: Tensor
    """(b, L)"""
    targets: Tensor
    """(b, s)"""
    nbytes: Tensor
    """(b, s): bytes of the targets."""
    scored: Tensor
    """(b, s): whether this window is the one that scores the target."""
    positions: Tensor
    """(b, s): of the targets among all tokens of the text."""


def cut(slab: Tensor, base: int, windows: Windows, index: Tensor, suffix: int) -> Cut:
    """Windows `index` (b,) out of slab (2, n), which holds the text from token `base` on; one indexing operation.

    A short window is filled up with the last token of the text: what follows a token does not change its score.
    """
    offsets = torch.arange(windows.window + 1, device=slab.device)
    positions = (windows.start(index)[:, None] + offsets).clamp(max=windows.targets)
    ids, nbytes = slab[:, positions - base]
    offsets = offsets[-suffix - 1 : -1]
    scored = (offsets >= windows.first_scored(index)[:, None]) & (offsets < windows.length(index)[:, None])
    return Cut(ids[:, :-1], ids[:, -suffix:], nbytes[:, -suffix:], scored, positions[:, -suffix:])


class Scorer:
    """Log probabilities of tokens: hidden states are the model's, the softmax over the vocabulary is not."""

    def __init__(
        self, model: GPT, dtype: torch.dtype, *, document_start: int | None = None, compiled: bool = False
    ) -> None:
        self.dtype, self.document_start, self.compiled = dtype, document_start, compiled
        self.vocab_size = model.config.vocab_size
        self.head_weight = model.head_weight.to(dtype)
        self.softcap = model.config.logit_softcap
        self._model = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model

    def hidden(self, ids: Tensor, suffix: int) -> Tensor:
        """(b, L) -> (b, suffix, D)."""
        whole = suffix == ids.size(1)
        return self._model(ids, dtype=self.dtype, suffix=None if whole else suffix, document_start=self.document_start)

    def logprobs(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """(b, s, D), (b, s), (b, s) -> (b, s) fp32 in nats, 0 where not mask."""
        return token_logprobs(hidden, self.head_weight, targets, softcap=self.softcap, mask=mask)

    def __call__(self, ids: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """(b, L), (b, s), (b, s) -> (b, s)."""
        return self.logprobs(self.hidden(ids, targets.size(1)), targets, mask)


def score_windows(
    scorer: Scorer, read: Read, windows: Windows, indices: range, batch: int
) -> Iterator[tuple[int, Cut, Tensor]]:
    """Score the windows `indices`, `batch` at a time; yields (index of the next window, batch, log probabilities)."""
    begin = indices.start
    while begin < indices.stop:
        suffix = windows.suffix(begin)
        alone = suffix != windows.stride  # the first window and the short ones
        rows = 1 if alone else batch
        many = max(1, (SLAB_TOKENS - windows.window) // (windows.stride * rows)) * rows
        stop = begin + 1 if alone else min(begin + many, indices.stop, windows.full)
        edges = windows.start(torch.tensor([begin, stop - 1])).tolist()
        slab = read(edges[0], min(edges[1] + windows.window, windows.targets) + 1)
        for low in range(begin, stop, rows):
            index = torch.arange(low, low + rows, device=slab.device)
            part = cut(slab, edges[0], windows, index.clamp(max=stop - 1), suffix)
            part = part._replace(scored=part.scored & (index < stop)[:, None])
            yield min(low + rows, stop), part, scorer(part.ids, part.targets, part.scored)
        begin = stop
