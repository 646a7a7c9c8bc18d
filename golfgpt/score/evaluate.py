"""Scoring: the mean nats per token and the bits per byte of a validation text, every token exactly once.

    val_loss = sum of nats / targets          val_bpb = sum of nats / ln 2 / bytes of the decoded text

Windows of L tokens start at 0, S, 2S, … (`score.windows`), so a token is predicted from L - S + 1 tokens or more,
except near the start of the text. Windows ignore document boundaries, as those of the published scripts do. With
eval.document_aware tokens attend within their document only, and a document's BOS is still a target, predicted from the
document before.

A score is printed only with proof: the windows cover every target once, the scored tokens are counted, their bytes
are counted twice, and `score.checks` checks a sample of the windows first. Sums stay on the device in float64 and
are read once a second. Memory depends on eval.batch_tokens, plus 40 bytes a window on the CPU; running out of it is an
error, because a silently smaller batch would hide that the one asked for does not fit.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from golfgpt.bpb import bits_per_byte
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import GolfError, InputError, Interrupted, VerificationError
from golfgpt.model.gpt import GPT
from golfgpt.published.windows import VARLEN_SEQUENCES
from golfgpt.score.checks import Checks, check
from golfgpt.score.sums import PartialSums, Sums
from golfgpt.score.ttt.plan import batches_and_phases, find_documents
from golfgpt.score.windows import Read, Scorer, Windows, score_windows

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
    """val_bpb, and what must be known before it is compared with another: a lossy tokenizer, documents, text left out
    or counted again."""
    seconds: float
    """On the first rank, with those before an interruption."""
    dtype: str
    """Of activations and matmuls."""
    partial: bool
    """Not all of the text was scored."""
    document_aware: bool
    checks: Checks
    published_bytes: int | None = None
    """Bytes of the scored tokens by the published CaseOps sidecar: of the original text, before a lossy normalizer."""
    published_bpb: float | None = None
    """The published form of val_bpb: the same nats over `published_bytes`."""

    @property
    def key(self) -> str:
        """The label as one word for log lines: val_bpb, val_bpb_first_4000_tokens."""
        return re.sub(r"[^a-z0-9]+", "_", self.label.lower().replace(",", "")).strip("_")


def open_dataset(config: RunConfig, ranks: Ranks) -> Dataset:
    """`fitting_dataset`, whose token ids are checked too, and the digests of val. Each rank reads a part. Raises
    InputError, and VerificationError for a val shard that differs from the manifest."""
    dataset = fitting_dataset(config)
    dataset.check_val_files(assigned=(ranks.rank, ranks.world))
    dataset.check_token_ids(config.model.vocab_size, assigned=(ranks.rank, ranks.world))
    if dataset.published:
        dataset.check_token_ids(config.model.vocab_size, "val")
        dataset.published_bytes(0, dataset.val_tokens)  # fails here and not after training
    return dataset


def named_dataset(config: RunConfig) -> Dataset:
    """The data set that `config` names. Raises InputError if there is none."""
    if config.data.path is None:
        raise InputError("no data: expected a prepared folder, --data.path DIR (see golfgpt data prepare)")
    return Dataset.open(Path(config.data.path))


def model_dataset(config: RunConfig) -> Dataset:
    """`named_dataset`. Raises InputError if it does not fit the model."""
    dataset = named_dataset(config)
    bos = dataset.need_tokenizer().bos_id
    for name, start in (("model", config.model.document_start), ("data", config.data.document_start)):
        if start is not None and start != bos:
            raise InputError(
                f"{name}.document_start is {start}; expected {bos}, which starts documents in {config.data.path}"
            )
    if dataset.vocab_size != config.model.vocab_size:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size}; expected {dataset.vocab_size}, the size of the tokenizer "
            f"in {config.data.path}: use --model.vocab-size {dataset.vocab_size}"
        )
    return dataset


def fitting_dataset(config: RunConfig) -> Dataset:
    """`model_dataset`. Raises InputError if it does not fit the way to score."""
    dataset = model_dataset(config)
    targets = plan_windows(dataset, config).targets
    if config.eval.ttt.kind == "phased":
        bos = dataset.need_tokenizer().bos_id
        batches_and_phases(find_documents(dataset.val_ids(0, targets + 1), bos), config.eval.ttt)
    m = config.model
    if within_documents(config) and m.document_start is None and m.mixes_tokens:
        raise InputError(
            f"eval.document_aware or eval.rule varlen expected a model that does not mix documents, got "
            f"smear_gate {m.smear_gate} and {m.bigram.rows} bigram rows without document_start; train with "
            "--model.document-start 1 (the BOS id), or score without these"
        )
    return dataset


def plan_windows(dataset: Dataset, config: RunConfig) -> Windows:
    """The windows that `evaluate` scores. Raises InputError when they do not fit the text."""
    targets = min(dataset.val_tokens - 1, config.eval.max_tokens or dataset.val_tokens)
    if config.eval.rule == "r4b" and targets > config.window:
        targets -= targets % config.window  # its published script cuts the text to whole windows
    if config.eval.rule == "varlen":
        row = VARLEN_SEQUENCES * config.window
        return Windows(targets, row, row, "varlen")
    return Windows(targets, config.window, config.stride, config.eval.rule)


def read_from(dataset: Dataset, device: torch.device) -> Read:
    """Reads the validation text, as `score.windows` and what scores with it do."""

    def read(start: int, stop: int) -> Tensor:
        text = np.stack((dataset.val_ids(start, stop), dataset.byte_counts(start, stop)))
        return torch.from_numpy(text.astype(np.int64)).to(device)

    return read


def within_documents(config: RunConfig) -> bool:
    """Whether tokens attend within their document only."""
    return config.eval.document_aware or config.eval.rule == "varlen"


def compiles(config: RunConfig, ranks: Ranks) -> bool:
    """Whether forwards are compiled."""
    if config.eval.compile == "on":
        return True
    if config.eval.compile == "off" or config.runtime.compile == "off":
        return False
    return ranks.device.type == "cuda"


def scored_shape(config: RunConfig, ranks: Ranks) -> tuple[int, ...]:
    """The shape of attention in a batch, as `select_backend` takes it."""
    if config.eval.rule == "varlen":
        return 1, VARLEN_SEQUENCES * config.window, config.window
    return batch_windows(config, ranks), config.window


def batch_windows(config: RunConfig, ranks: Ranks) -> int:
    """The most windows that one batch holds."""
    if config.eval.rule == "varlen":
        return 1
    return max(1, (config.eval.batch_tokens or BATCH_TOKENS[ranks.device.type]) // config.window)


def share(windows: Windows, config: RunConfig, ranks: Ranks) -> tuple[range, int]:
    """The windows that this rank scores, and how many in a batch at most."""
    mine = range(*(len(windows) * r // ranks.world for r in (ranks.rank, ranks.rank + 1)))
    batches = math.ceil(len(mine) / batch_windows(config, ranks))
    return mine, max(1, math.ceil(len(mine) / max(1, batches)))  # even batches: little filling at the end


def scorer_of(
    model: GPT, windows: Windows, document_start: int | None, config: RunConfig, ranks: Ranks, dtype: torch.dtype
) -> Scorer:
    """Scores `windows` with the weights of `model`."""
    longest = windows.context if config.eval.rule == "varlen" else None
    compiled = compiles(config, ranks) and not longest  # its rows have as many boundaries as they have documents
    return Scorer(model, dtype, document_start=document_start, longest=longest, compiled=compiled)


@torch.no_grad()
def evaluate(
    model: GPT,
    dataset: Dataset,
    config: RunConfig,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda line: None,
    keep: PartialSums | None = None,
) -> Score:
    """Score `model` on the validation split; each rank scores a contiguous range of the windows.

    `progress` gets a line about this rank's range every second. With `keep` an interrupted evaluation continues where
    it was saved: every ten seconds, and when Interrupted, KeyboardInterrupt or a lack of memory ends it. Raises
    InputError for windows that do not fit and tokens outside the vocabulary, NonFiniteError naming the first bad
    token, and VerificationError when the windows do not cover every target once, when sampled ones fail a check, or
    when the bytes of the text, counted again by decoding it, are not those that the score is divided by.
    """
    windows = plan_windows(dataset, config)
    runs = windows.coverage()
    if windows.rule == "every_token" and runs != [(range(windows.targets), 1)]:
        raise VerificationError(f"the windows do not score each of {windows.targets} targets once: no score")
    mine, most = share(windows, config, ranks)
    document_start = dataset.need_tokenizer().bos_id if within_documents(config) else None
    scorer = scorer_of(model, windows, document_start, config, ranks, dtype)
    key = {"text": dataset.digest, "dtype": str(dtype), "document_start": document_start, "world": ranks.world}
    key |= {name: getattr(windows, name) for name in ("targets", "window", "stride", "rule")}
    keep = keep or PartialSums(None)

    read = read_from(dataset, ranks.device)
    sums = Sums.start(mine.start, ranks.device)
    with ranks.raise_on_any():
        try:
            dataset.check_token_ids(model.config.vocab_size, "val")
            published = _published_bytes(dataset, runs)
            sums = keep.open(key, sums)
            findings = check(scorer, windows, read, mine, most)
            resumed, began = sums, time.perf_counter()
            told = began
            for stop, batch, logprobs in score_windows(scorer, read, windows, range(sums.next, mine.stop), most):
                sums = sums.plus(stop, batch, logprobs)
                now = time.perf_counter()
                if now - told >= PROGRESS_SECONDS or stop == mine.stop:
                    told = now
                    line = _progress_line(sums, resumed, windows.num_targets(mine), now - began)
                    progress(line + f" (1 of {ranks.world} processes)" * (ranks.world > 1))
                    keep.save(sums, every=SAVE_SECONDS)
            if ranks.world > 1:
                keep.save(sums)  # another rank may still be stopped
            proved = _proved_bytes(dataset, runs) if ranks.is_main else None
        except (Interrupted, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
            keep.save(sums)
            raise
        except GolfError:
            keep.clear()
            raise
    nats, tokens, nbytes = ranks.sum_(sums.values.clone()).tolist()
    keep.clear()
    targets = windows.num_targets(range(len(windows)))
    if tokens != targets or proved not in (None, nbytes):
        raise VerificationError(
            f"scored {tokens:.0f} of {targets} tokens and {nbytes:.0f} of {proved} bytes: no score can be proved"
        )
    return Score(
        val_loss=nats / tokens,
        val_bpb=bits_per_byte(nats, int(nbytes)),
        nats=nats,
        tokens=int(tokens),
        bytes=int(nbytes),
        window=windows.context,
        stride=min(windows.stride, windows.context),
        label=score_label(dataset, windows, within_documents(config)),
        seconds=keep.seconds,
        dtype=str(dtype).removeprefix("torch."),
        partial=sum(len(run) for run, _ in runs) < dataset.val_tokens - 1,
        document_aware=within_documents(config),
        checks=Checks.of(findings, windows, ranks),
        published_bytes=published,
        published_bpb=bits_per_byte(nats, published) if published else None,
    )


def _progress_line(sums: Sums, resumed: Sums, total: int, seconds: float) -> str:
    """How far this rank is after `seconds` since `resumed`. Raises NonFiniteError when the sums are not finite."""
    nats, tokens, nbytes = sums.read()
    rate = (tokens - resumed.read()[1]) / seconds
    running = f"{bits_per_byte(nats, nbytes):.4f}" if nbytes else "none"
    return (
        f"{tokens:,} of {total:,} tokens, {running} bits per byte so far, {rate:,.0f} tokens/s, "
        f"{(total - tokens) / max(rate, 1e-9):.0f} s left"
    )


def _proved_bytes(dataset: Dataset, runs: list[tuple[range, int]]) -> int:
    """Bytes of the targets of `runs`, as often as each is scored, proved by decoding them."""
    prove = functools.cache(dataset.prove_val_bytes)
    return sum((prove(run.stop + 1) - prove(run.start + 1)) * times for run, times in runs)


def _published_bytes(dataset: Dataset, runs: list[tuple[range, int]]) -> int | None:
    """Bytes of the targets of `runs`, as often as each is scored, by the published sidecar; None without one."""
    counts = [dataset.published_bytes(run.start + 1, run.stop + 1) for run, _ in runs]
    if None in counts:
        return None
    return sum(count * times for count, (_, times) in zip(counts, runs, strict=True))


def score_label(dataset: Dataset, windows: Windows, document_aware: bool) -> str:
    """val_bpb, and what must be known before it is compared with another."""
    runs = windows.coverage()
    notes = [] if dataset.lossless else ["normalized text"]
    notes += ["document-aware"] if document_aware else []
    if windows.targets < dataset.val_tokens - 1:
        notes.append(f"first {windows.targets:,} tokens")
    rule = windows.rule.capitalize()
    unscored = {"first": runs[0][0].start, "last": windows.targets - runs[-1][0].stop}
    if windows.rule == "varlen":
        unscored = {"": windows.targets - windows.num_targets(range(len(windows)))}
    if parts := [f"{side} {count:,}".strip() for side, count in unscored.items() if count]:
        notes.append(f"{rule}: {' and '.join(parts)} tokens not scored")
    if any(times > 1 for _, times in runs):
        notes.append(f"{rule}: counts the tail's tokens more than once")
    return " ".join(["val_bpb", *(f"({note})" for note in notes)])
