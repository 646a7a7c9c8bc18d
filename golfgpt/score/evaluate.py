"""Scoring: the mean nats per token and the bits per byte of a validation text, every token exactly once.

    val_loss = sum of nats / targets          val_bpb = sum of nats / ln 2 / bytes of the decoded text

Windows of L tokens start at 0, S, 2S, … (`score.windows`). So a token is predicted from L - S + 1 tokens or more,
all of them near the start of the text, and stride = window gives the usual chunks. Windows ignore document
boundaries, as upstream's do; with eval.document_aware tokens attend within their document only. A document's BOS is
then still a target like any other: predicted from the document before, it says that this one ends. With eval.rule
windows are those of a published recipe, which leaves tokens out or counts some again; the label says so.

A score is printed only with proof: the scored tokens are counted, their bytes are counted twice, and
`score.checks` checks a sample of the windows first. Sums stay on the device in float64 and are read once a
second, for the progress line, for the partial sums that an interrupted evaluation continues from, and to see that
they are finite. Memory depends on eval.batch_tokens, never on the length of the text; running out of it is an error,
for a silently smaller batch would hide that the one asked for does not fit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golfgpt.bpb import bits_per_byte
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import GolfError, InputError, Interrupted, NonFiniteError, VerificationError
from golfgpt.files import write_json
from golfgpt.model.gpt import GPT
from golfgpt.published.windows import whole_windows
from golfgpt.score.checks import Checks, check
from golfgpt.score.windows import Batch, Scorer, Windows, score_windows

PROGRESS_SECONDS, SAVE_SECONDS = 1.0, 10.0
BATCH_TOKENS = {"cuda": 65_536, "cpu": 16_384}
"""On a CPU (recipe small, window 512, stride 64, one thread) 1,024 to 32,768 tokens are equally fast within the noise
and take 0.03 to 0.7 GiB; 65,536 are 1.5 times as slow. On a GPU never timed."""


@dataclass(frozen=True)
class Score:
    """The result of one evaluation."""

    val_loss: float
    """Mean nats per scored token."""
    val_bpb: float
    """Bits per byte of decoded text."""
    nats: float
    tokens: int
    """Scored tokens: all but the first of the text, unless `partial`; with rule r4b some are counted again."""
    bytes: int
    """UTF-8 bytes of the scored text after decoding."""
    window: int
    stride: int
    label: str
    """val_bpb; with a suffix when the text is normalized by a lossy tokenizer, only partly scored, scored within
    documents, or by a published rule that leaves tokens out or counts some again."""
    seconds: float
    """On the first rank, with those before an interruption."""
    dtype: str
    """Of activations and matmuls."""
    partial: bool
    """Not all of the text was scored."""
    document_aware: bool
    checks: Checks

    @property
    def key(self) -> str:
        """The label as one word for log lines: val_bpb, val_bpb_first_4000_tokens."""
        return re.sub(r"[^a-z0-9]+", "_", self.label.lower().replace(",", "")).strip("_")


@dataclass(frozen=True)
class Sums:
    """What the windows before `next` gave, on the device. Never changed in place: a signal may come at any time."""

    next: int
    values: Tensor
    """float64 (3,): nats, tokens, bytes; the last two are exact up to 2^53."""
    bad: Tensor
    """Position of the first token without a finite log probability; a huge number if there is none."""

    @classmethod
    def start(cls, next: int, device: torch.device, values: Sequence[float] = (0, 0, 0)) -> Sums:
        none = torch.tensor(torch.iinfo(torch.int64).max, device=device)
        return cls(next, torch.tensor(values, dtype=torch.float64, device=device), none)

    def plus(self, next: int, batch: Batch, logprobs: Tensor) -> Sums:
        """With the batch that ends before window `next`; the order of additions is fixed."""
        nbytes = batch.nbytes.where(batch.scored, 0)
        added = torch.stack((-logprobs.double().sum(), batch.scored.sum().double(), nbytes.sum().double()))
        bad = torch.where(logprobs.isfinite(), self.bad, batch.positions).min()
        return Sums(next, self.values + added, torch.minimum(bad, self.bad))

    def read(self) -> tuple[float, int, int]:
        """Nats, tokens, bytes. Raises NonFiniteError naming the first bad token."""
        nats, tokens, nbytes = self.values.tolist()
        if not math.isfinite(nats):
            raise NonFiniteError(f"the model gives token {int(self.bad)} of the validation text no finite probability")
        return nats, int(tokens), int(nbytes)


class PartialSums:
    """One rank's sums of an evaluation under way, in `folder`/eval_partial_RANK.json while it runs; None: nowhere.

    The file belongs to one evaluation: of one model (its digest), text, plan of windows, dtype and number of ranks.
    `say` gets lines for the user.
    """

    def __init__(
        self, folder: Path | None, rank: int = 0, model_digest: str = "", say: Callable[[str], None] = lambda line: None
    ):
        self._file = folder and folder / f"eval_partial_{rank}.json"
        self._model, self._say, self._warned = model_digest, say, False
        self._begun = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the evaluation began, with those before it was interrupted."""
        return time.monotonic() - self._begun

    def open(self, key: dict[str, Any], fresh: Sums) -> Sums:
        """Begin the evaluation that `key` tells apart; returns the sums of the file, or `fresh` ones."""
        self._key, self._begun = {"model": self._model, **key}, time.monotonic()
        if not self._file or not self._file.exists():
            return fresh
        try:
            stored = json.loads(self._file.read_bytes())
            changed = [name for name, value in self._key.items() if stored["key"].get(name) != value]
            problem = f"is of another evaluation ({', '.join(changed)} changed)" if changed else None
            sums = Sums.start(stored["next"], fresh.values.device, stored["values"])
            seconds = float(stored["seconds"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            problem = "is damaged"
        if problem:
            self._say(f"{self._file} {problem}: starting over")
            return fresh
        self._begun -= seconds
        self._say(f"continuing an interrupted evaluation: {int(sums.values[1]):,} tokens are scored already")
        return sums

    def save(self, sums: Sums) -> None:
        """Write the file. One that cannot be written is a warning, once; the evaluation goes on."""
        self._saved = time.monotonic()
        values = sums.values.tolist()
        if not self._file or not values[1] or not math.isfinite(values[0]):
            return
        try:
            write_json(self._file, {"key": self._key, "next": sums.next, "values": values, "seconds": self.seconds})
        except OSError as error:
            if not self._warned:
                self._say(f"warning: {self._file}: {error.strerror}; an interrupted evaluation would start over")
            self._warned = True

    def save_at_times(self, sums: Sums) -> None:
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save(sums)

    def clear(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.unlink()


def plan_windows(dataset: Dataset, config: RunConfig) -> Windows:
    """The windows that `evaluate` scores. Raises InputError when they do not fit the text."""
    targets = min(dataset.val_tokens - 1, config.eval.max_tokens or dataset.val_tokens)
    if config.eval.rule == "r4b" and targets > config.window:
        targets = whole_windows(targets, config.window)
    return Windows(targets, config.window, config.stride, config.eval.rule)


def batch_windows(config: RunConfig, ranks: Ranks) -> int:
    """The most windows that one batch holds."""
    return max(1, (config.eval.batch_tokens or BATCH_TOKENS[ranks.device.type]) // config.window)


@torch.no_grad()
def evaluate(
    model: GPT,
    dataset: Dataset,
    config: RunConfig,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    progress: Callable[[str], None] | None = None,
    keep: PartialSums | None = None,
) -> Score:
    """Score `model` on the validation split; each rank scores a contiguous range of the windows.

    `progress` gets a line about this rank's range every second: running bits per byte, tokens a second, time left.
    With `keep` an interrupted evaluation continues where it was saved, every ten seconds and when Interrupted
    or KeyboardInterrupt ends it. Raises InputError for windows that do not fit and tokens outside the vocabulary,
    NonFiniteError naming the first bad token, and VerificationError when the windows do not score every target once,
    when the sampled ones break a rule, or when the bytes of the text, counted a second time by decoding it, are not
    those that the score is divided by.
    """
    windows = plan_windows(dataset, config)
    runs = windows.coverage()
    if windows.rule == "every_token" and runs != [(range(windows.targets), 1)]:
        raise VerificationError(f"the windows do not score each of {windows.targets} targets once: no score")
    mine = range(*(len(windows) * r // ranks.world for r in (ranks.rank, ranks.rank + 1)))
    batches = math.ceil(len(mine) / batch_windows(config, ranks))
    most = max(1, math.ceil(len(mine) / max(1, batches)))  # even batches: little filling at the end
    document_start = dataset.need_tokenizer().bos_id if config.eval.document_aware else None
    compile = config.runtime.compile == "on" or (config.runtime.compile == "auto" and ranks.device.type == "cuda")
    scorer = Scorer(model, dtype, document_start=document_start, compiled=compile)
    read = functools.partial(_read, dataset, model.config.vocab_size, ranks.device)
    key = {"text": dataset.digest, "dtype": str(dtype), "document_start": document_start, "world": ranks.world}
    key |= {name: getattr(windows, name) for name in ("targets", "window", "stride", "rule")}
    keep = keep or PartialSums(None)

    sums = Sums.start(mine.start, ranks.device)
    with ranks.raise_on_any():
        try:
            sums = keep.open(key, sums)
            findings = check(scorer, windows, read, mine, most)
            report = _Progress(progress, windows.num_targets(mine), sums)
            for stop, batch, logprobs in score_windows(scorer, read, windows, range(sums.next, mine.stop), most):
                sums = sums.plus(stop, batch, logprobs)
                if report.due() or stop == mine.stop:
                    report(sums)
                    keep.save_at_times(sums)
            if ranks.world > 1:
                keep.save(sums)  # another rank may still be stopped
            proved = _prove_bytes(dataset, runs) if ranks.is_main else None
        except (Interrupted, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
            keep.save(sums)
            raise
        except GolfError:
            keep.clear()
            raise
    nats, tokens, nbytes = ranks.sum_(sums.values.clone()).tolist()
    tokens, nbytes = int(tokens), int(nbytes)
    keep.clear()
    targets = windows.num_targets(range(len(windows)))
    if tokens != targets or proved not in (None, nbytes):
        raise VerificationError(
            f"scored {tokens} of {targets} tokens and {nbytes} of {proved} bytes: no score can be proved"
        )
    return Score(
        val_loss=nats / tokens,
        val_bpb=bits_per_byte(nats, nbytes),
        nats=nats,
        tokens=tokens,
        bytes=nbytes,
        window=windows.window,
        stride=windows.stride,
        label=_label(dataset, windows, runs, config.eval.document_aware),
        seconds=keep.seconds,
        dtype=str(dtype).removeprefix("torch."),
        partial=sum(len(targets) for targets, _ in runs) < dataset.val_tokens - 1,
        document_aware=config.eval.document_aware,
        checks=Checks.of(findings, windows, ranks),
    )


def _read(dataset: Dataset, vocab_size: int, device: torch.device, start: int, stop: int) -> Tensor:
    """`windows.Read` of the validation text. Raises InputError for a token outside the vocabulary."""
    ids = dataset.val_ids(start, stop)
    if int(ids.max()) >= vocab_size:
        at = int((ids >= vocab_size).argmax())
        raise InputError(
            f"token {start + at} of the validation text is {ids[at]}, outside the model's vocabulary of "
            f"{vocab_size}; it was prepared with another tokenizer, or a shard is damaged"
        )
    return torch.from_numpy(np.stack((ids, dataset.byte_counts(start, stop))).astype(np.int64)).to(device)


def _prove_bytes(dataset: Dataset, runs: list[tuple[range, int]]) -> int:
    """The bytes of the targets of `runs`, as often as each is scored; proved by decoding them."""
    prove = functools.cache(dataset.prove_val_bytes)
    return sum((prove(targets.stop + 1) - prove(targets.start + 1)) * times for targets, times in runs)


class _Progress:
    """Tells `progress` about this rank's windows, and raises NonFiniteError when their sums are not finite."""

    def __init__(self, progress: Callable[[str], None] | None, total: int, sums: Sums):
        self._progress, self._total = progress, total
        self._begun = self._told = time.perf_counter()
        self._already = int(sums.values[1])

    def due(self) -> bool:
        return time.perf_counter() - self._told >= PROGRESS_SECONDS

    def __call__(self, sums: Sums) -> None:
        nats, tokens, nbytes = sums.read()
        self._told = time.perf_counter()
        if self._progress:
            rate = (tokens - self._already) / (self._told - self._begun)
            running = f"{bits_per_byte(nats, nbytes):.4f}" if nbytes else "none"
            self._progress(
                f"{tokens:,} of {self._total:,} tokens, {running} bits per byte so far, {rate:,.0f} tokens/s, "
                f"{(self._total - tokens) / max(rate, 1e-9):.0f} s left"
            )


def _label(dataset: Dataset, windows: Windows, runs: list[tuple[range, int]], document_aware: bool) -> str:
    """val_bpb, and what must be known before it is compared with another."""
    notes = [] if dataset.lossless else ["normalized text"]
    notes += ["document-aware"] if document_aware else []
    if windows.targets < dataset.val_tokens - 1:
        notes.append(f"first {windows.targets:,} tokens")
    rule = windows.rule.capitalize()
    unscored = {"first": runs[0][0].start, "last": windows.targets - runs[-1][0].stop}
    if parts := [f"{side} {count:,}" for side, count in unscored.items() if count]:
        notes.append(f"{rule}: {' and '.join(parts)} tokens not scored")
    if any(times > 1 for _, times in runs):
        notes.append(f"{rule}: counts the tail's tokens more than once")
    return " ".join(["val_bpb", *(f"({note})" for note in notes)])
