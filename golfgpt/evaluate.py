"""Scoring: the mean nats per token and the bits per byte of a validation text, every token exactly once.

The text is one stream of N tokens; token 0 has no context and is no target, the other N - 1 are. Windows of
L inputs start at 0, S, 2S, …; the last one is shifted back to end with the text. The first window scores all
its targets, each later one those that no earlier window scored. So a token has at least L - S tokens of
context (all of them near the start), and stride = window gives the usual chunks. Windows ignore document
boundaries, as upstream's do.

    val_loss = sum of nats / targets          val_bpb = sum of nats / ln 2 / bytes of the decoded text

The scorer owns the softmax: the model gives hidden states, `golfgpt_kernels.token_logprobs` the normalized
log probabilities. Memory depends on eval.batch_tokens, never on the length of the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from golfgpt_kernels import token_logprobs
from torch import Tensor

from golfgpt.bpb import bits_per_byte
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import GolfError, InputError, NonFiniteError, VerificationError
from golfgpt.model import GPT


@dataclass(frozen=True)
class Score:
    """The result of one evaluation."""

    val_loss: float
    """Mean nats per scored token."""
    val_bpb: float
    """Bits per byte of decoded text."""
    nats: float
    tokens: int
    """Scored tokens: all but the first of the text."""
    bytes: int
    """UTF-8 bytes of the scored text after decoding."""
    window: int
    stride: int
    label: str
    """val_bpb; with a suffix when the text is normalized by a lossy tokenizer or only partly scored."""
    seconds: float
    dtype: str
    """Of activations and matmuls."""
    partial: bool
    """Only the leading tokens of the text were scored."""


@dataclass(frozen=True)
class Windows:
    """All windows over `targets` target positions; window i covers inputs start(i) .. start(i) + window - 1.

    Raises InputError for a window longer than the text, a stride of 0 or beyond the window.
    """

    targets: int
    window: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise InputError(f"eval.stride must lie in 1..{self.window} (the window), got {self.stride}")
        if self.window > self.targets:
            raise InputError(
                f"eval.window {self.window} is longer than the text's {self.targets} target tokens; "
                "choose a smaller window"
            )

    def __len__(self) -> int:
        return 1 + -(-(self.targets - self.window) // self.stride)

    def start(self, index: np.ndarray) -> np.ndarray:
        """First input position of each window."""
        return np.minimum(index * self.stride, self.targets - self.window)

    def first_scored(self, index: np.ndarray) -> np.ndarray:
        """Offset inside each window of the first target that no earlier window scored."""
        return np.where(index == 0, 0, (index - 1) * self.stride + self.window - self.start(index))


def plan_windows(dataset: Dataset, config: RunConfig) -> Windows:
    """The windows that `evaluate` scores. Raises InputError when they do not fit the text."""
    targets = min(dataset.val_tokens - 1, config.eval.max_tokens or dataset.val_tokens)
    return Windows(targets, config.window, config.stride)


def score_windows(
    hidden_states: Callable[[Tensor], Tensor],
    head_weight: Tensor,
    softcap: float,
    read_tokens: Callable[[int, int], np.ndarray],
    windows: Windows,
    indices: range,
    batch: int,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Yield (target positions int64, nats float32) of the windows `indices`, `batch` windows at a time.

    `hidden_states` maps ids (b, window) to (b, window, D); `read_tokens(start, stop)` gives stream tokens.
    Every batch has the same shape: the last one is filled up with repeats of its last window, unscored.
    """
    offsets = np.arange(windows.window)
    for begin in range(indices.start, indices.stop, batch):
        real = min(batch, indices.stop - begin)
        index = np.minimum(np.arange(begin, begin + batch), begin + real - 1)
        start = windows.start(index)
        slab = read_tokens(int(start[0]), int(start[-1]) + windows.window + 1)
        span = torch.from_numpy(slab[(start - start[0])[:, None] + np.arange(windows.window + 1)].astype(np.int64))
        mask = offsets >= windows.first_scored(index)[:, None]
        mask[real:] = False
        span, where = span.to(device), torch.from_numpy(mask).to(device)
        hidden = hidden_states(span[:, :-1])
        logprobs = token_logprobs(hidden[where], head_weight, span[:, 1:][where], softcap=softcap)
        yield (start[:, None] + offsets + 1)[mask], -logprobs.cpu().numpy()


@torch.no_grad()
def evaluate(
    model: GPT,
    dataset: Dataset,
    config: RunConfig,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    progress: Callable[[int, int, float], None] | None = None,
) -> Score:
    """Score `model` on the validation split, windows dealt to the ranks in contiguous ranges.

    `progress(done, total, bpb)` is called after every batch of this rank with its own running score.
    Raises InputError for windows that do not fit, NonFiniteError naming the first bad token, and
    VerificationError when the bytes of the text, counted a second time by decoding it, are not the bytes
    that the score is divided by.
    """
    begun = time.perf_counter()
    windows = plan_windows(dataset, config)
    targets = windows.targets
    share = range(*(len(windows) * r // ranks.world for r in (ranks.rank, ranks.rank + 1)))
    most = max(1, config.eval.batch_tokens // windows.window)
    batch = max(1, -(-len(share) // max(1, -(-len(share) // most))))  # even batches: little filling at the end
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes: exact integers up to 2^53
    proved, failed = 0, None
    try:
        scored = score_windows(
            lambda ids: model(ids, dtype=dtype),
            model.head_weight.to(dtype),
            model.config.logit_softcap,
            dataset.val_ids,
            windows,
            share,
            batch,
            ranks.device,
        )
        for positions, nats in scored:
            if not np.isfinite(nats).all():
                bad = int(positions[~np.isfinite(nats)][0])
                raise NonFiniteError(f"the model gives token {bad} of the validation text no finite probability")
            low, high = int(positions[0]), int(positions[-1]) + 1
            counts = dataset.byte_counts(low, high)[positions - low]
            sums += torch.tensor([nats.astype(np.float64).sum(), nats.size, counts.sum(dtype=np.float64)])
            if progress:
                running = bits_per_byte(float(sums[0]), max(int(sums[2]), 1))
                progress(int(sums[1]), targets // ranks.world, running)
        if ranks.main:
            proved = dataset.prove_val_bytes(targets + 1) - int(dataset.byte_counts(0, 1)[0])
    except GolfError as error:
        failed = error
    ranks.settle(failed)
    sums = ranks.sum_(sums.to(ranks.device)).cpu()
    nats, tokens, nbytes = float(sums[0]), int(sums[1]), int(sums[2])
    if tokens != targets or (ranks.main and nbytes != proved):
        raise VerificationError(
            f"scored {tokens} of {targets} tokens and {nbytes} of {proved} bytes: no score can be proved"
        )
    partial = tokens < dataset.val_tokens - 1
    label = "val_bpb" if dataset.lossless else "val_bpb (normalized text)"
    return Score(
        val_loss=nats / tokens,
        val_bpb=bits_per_byte(nats, nbytes),
        nats=nats,
        tokens=tokens,
        bytes=nbytes,
        window=windows.window,
        stride=windows.stride,
        label=label + (f" (first {tokens:,} tokens)" if partial else ""),
        seconds=time.perf_counter() - begun,
        dtype=str(dtype).removeprefix("torch."),
        partial=partial,
    )
