"""In which order an adapted score scores and learns, made before anything is scored, from lengths and places alone.

    sliding     the windows of the text by chunks: a chunk's windows are scored, then its tokens are learned
    documents   batches of documents of similar length, chunk after chunk of each, learned from the scored forward

Batch i belongs to rank i mod n (published: to the rank that comes first, so the result depends on timing).

Sources: the published scripts of 2026-03-23 and 2026-04-06 (sliding), 2026-04-10 to 2026-04-27 (documents).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from golfgpt.config import LoRAConfig, TTTConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.score.ttt.adapter import Step
from golfgpt.score.windows import Batch, Read, Windows, batches


def sliding(windows: Windows, chunk: int, length: int, most: int, ranks: Ranks) -> Iterator[Step]:
    """The windows in order, by chunks of `chunk` targets: a window belongs to the chunk of its first scored target.
    After a chunk, all but the last, its targets are learned in whole sequences of `length`. Ranks divide a chunk's
    windows, at most `most` of them per forward."""
    num_chunks = -(-windows.targets // chunk)
    edges = np.searchsorted(np.minimum(windows.begin // chunk, num_chunks - 1), np.arange(num_chunks + 1))
    for i, (low, high) in enumerate(pairwise(edges)):
        mine = range(*(int(low + (high - low) * r // ranks.world) for r in (ranks.rank, ranks.rank + 1)))
        learned = min(chunk, windows.targets - i * chunk) // length * length if i < num_chunks - 1 else 0
        text = (range(i * chunk, i * chunk + learned + 1),) if learned else ()
        yield Step(partial(_windows, windows, mine, most), text=text, part=(i, num_chunks))


def _windows(windows: Windows, indices: range, most: int, read: Read) -> Iterator[Batch]:
    return (batch for _, batch in batches(read, windows, indices, most))


class Document(NamedTuple):
    """Tokens of a document: from its BOS to the next one, which is its last target."""

    start: int
    length: int
    """At least 2."""


def find_documents(ids: np.ndarray, document_start: int) -> list[Document]:
    """The documents of the text `ids` (T,), in order: their targets are all but the text's first token, once each. What
    stands before the first BOS is one too."""
    begins = np.union1d(0, np.flatnonzero(ids == document_start))
    ends = np.append(begins[1:] + 1, len(ids))
    return [Document(int(a), int(b - a)) for a, b in zip(begins, ends, strict=True) if b - a > 1]


def document_batches(documents: Sequence[Document], config: LoRAConfig) -> list[list[Document]]:
    """Batches in the order in which they are scored. By length: cut from the shortest document on, scored from the
    longest batch on, so the first one may be smaller."""
    ordered = sorted(documents, key=lambda document: document.length) if config.order == "length" else documents
    cut = [list(ordered[i : i + config.documents]) for i in range(0, len(ordered), config.documents)]
    return cut[::-1] if config.order == "length" else cut


def phase_texts(
    batches: Sequence[Sequence[Document]], phases: int, documents: int, order: str
) -> dict[int, list[Document]]:
    """Batch after which a phase comes -> what it learns: scored documents up to the phase's share of `documents`, by
    batch in the order of length, so that the longest are left out, and in that of scoring if that is the stream's.
    After a batch comes at most one phase. Published ones wait for the batches of all ranks; here a phase comes after
    the batch that completes the share, whatever the number of ranks."""
    after, done, phase = {}, [], 0
    for i, batch in enumerate(batches):
        done = [*batch, *done] if order == "length" else [*done, *batch]
        if phase < phases and len(done) >= (share := documents * (phase + 1) // phases):
            phase += 1
            if share:
                after[i] = done[:share]
    return after


def batches_and_phases(
    documents: Sequence[Document], ttt: TTTConfig
) -> tuple[list[list[Document]], dict[int, list[Document]]]:
    """`document_batches` and, with kind phased, their `phase_texts`. Raises InputError for a text with too few
    documents for a phase."""
    batches, texts = document_batches(documents, ttt.lora), {}
    if ttt.kind == "phased":
        texts = phase_texts(batches, ttt.phases, ttt.phase_documents, ttt.lora.order)
        if not texts:
            raise InputError(
                f"eval.ttt.kind is phased, but the text has {len(documents)} documents and the first phase comes after "
                f"{-(-ttt.phase_documents // ttt.phases)} or more: lower eval.ttt.phase_documents, or use kind lora"
            )
    return batches, texts


def documents(
    batches: Sequence[Sequence[Document]],
    chunk: int,
    window: int,
    ranks: Ranks,
    phases: Mapping[int, Sequence[Document]] | None = None,
) -> Iterator[Step]:
    """The documents of this rank's batches, by chunks of `chunk` targets, each predicted from up to `window` tokens of
    its document. `phases`, as from `phase_texts`, are learned by all ranks."""
    phases = phases or {}
    for i, batch in enumerate(batches):
        if i % ranks.world == 0:
            yield Step(meets=True)
        if i % ranks.world == ranks.rank:
            yield from _chunks(batch, chunk, window, ranks.device)
        if i in phases:
            yield Step(text=tuple(range(start, start + length) for start, length in phases[i]))


def _chunks(batch: Sequence[Document], chunk: int, window: int, device: torch.device) -> Iterator[Step]:
    predicted = np.array([document.length for document in batch]) - 1
    starts = torch.tensor([document.start for document in batch], device=device)
    slab = None

    def cut(i: int, read: Read) -> Iterator[Batch]:
        nonlocal slab
        if slab is None:
            slab = torch.zeros(2, len(batch), int(predicted.max()) + 1, dtype=torch.int64, device=device)
            for row, (start, length) in enumerate(batch):
                slab[:, row, :length] = read(start, start + length)
        yield chunk_batch(slab, starts, chunk_windows(i, predicted, chunk, window), i * chunk, chunk)

    for i in range(-(-int(predicted.max()) // chunk)):
        later = predicted > (i + 1) * chunk
        again = torch.from_numpy(later).to(device, torch.float32) if later.any() else None
        yield Step(partial(cut, i), rows=None if i else len(batch), again=again)


def chunk_windows(index: int, predicted: np.ndarray, chunk: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (b,), among the inputs of each document with `predicted` (b,) targets, of the window in which its
    chunk `index` is scored; it ends with the chunk. A document without such a chunk has its last window."""
    end = np.minimum((index + 1) * chunk, predicted)
    return np.maximum(0, end - window), end


def chunk_batch(slab: Tensor, starts: Tensor, windows: tuple[np.ndarray, np.ndarray], first: int, chunk: int) -> Batch:
    """Windows (start, end) of the documents slab (2, b, n), whose tokens stand from `starts` (b,) on in the text, with
    the targets from `first` on. Documents are aligned to the left and filled up with token 0; the targets are among
    the last `chunk` of the batch, for only windows that begin with their document can be shorter than others."""
    start, end = (torch.from_numpy(side)[:, None].to(slab.device) for side in windows)
    length = int(max((b - a for a, b in zip(*windows, strict=True) if b > first), default=0))
    place = start + torch.arange(length, device=slab.device)  # (b, L) among the document's inputs
    ids, (targets, nbytes) = (
        slab[:, torch.arange(len(starts), device=slab.device)[:, None], (place + shift).clamp(max=slab.size(2) - 1)]
        for shift in (0, 1)
    )
    inside = place < end
    last = slice(-min(chunk, length), None)
    scored = (inside & (place >= first))[:, last]
    positions = starts[:, None] + place + 1
    return Batch(ids[0].where(inside, 0), targets[:, last], nbytes[:, last], scored, positions[:, last])
