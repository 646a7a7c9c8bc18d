"""The adapted score: bits per byte of the validation text with weights that learn from what is scored already.

It stands beside the plain score (`golfgpt.score.evaluate`), never in its place, and names its kind. Like that it is
proved: tokens and bytes are counted twice, and `compliance` says what was checked. The clock stops it between two
steps; what is scored by then is kept, as it is where the learning rate makes the weights diverge.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from golfgpt.bpb import bits_per_byte
from golfgpt.config import RunConfig, TTTConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import BudgetError, GolfError, Interrupted, NonFiniteError, PeerError, VerificationError
from golfgpt.model.gpt import GPT
from golfgpt.score.evaluate import PROGRESS_SECONDS, batch_windows, compiles, plan_windows, read_from, score_label
from golfgpt.score.sums import Sums
from golfgpt.score.ttt import plan
from golfgpt.score.ttt.adapter import Adapter, Step, prepared, run
from golfgpt.score.ttt.compliance import CHUNKS, SAMPLE, Compliance, Sample, code_length, independence
from golfgpt.score.ttt.ledger import NEVER, Ledger
from golfgpt.score.ttt.lora import DocumentLoRA, PhasedLoRA
from golfgpt.score.ttt.sgd import SGD
from golfgpt.score.windows import Scorer, Windows

PUBLISHED = {"sgd": {"lr": 0.005, "epochs": 3}, "phased": {"lr": 0.001, "epochs": 1}}
"""What settings of SGD are by default."""
_AT_ONCE = contextlib.nullcontext(lambda: None)
"""Signals raise where they come."""


@dataclass(frozen=True)
class AdaptedScore:
    """The result of one evaluation with test-time training."""

    kind: str
    """sgd, lora or phased."""
    val_loss: float
    """Mean nats per scored token."""
    val_bpb: float
    nats: float
    tokens: int
    bytes: int
    """UTF-8 bytes of the scored tokens after decoding."""
    label: str
    """val_bpb, the kind, and what must be known before it is compared with another score."""
    seconds: float
    """On the first rank, checks included."""
    max_seconds: float
    partial: bool
    """Not all of the text was scored."""
    stopped: str | None
    """Why it ended before the text did."""
    diverged: bool
    """Whether that was for a number that is not finite."""
    published_bpb: float | None
    """The same nats over the bytes of the published CaseOps sidecar; None without one, or if it was stopped."""
    dataset: str
    """Digest of the data set."""
    dtype: str
    window: int
    stride: int
    settings: dict
    """config.eval.ttt, with the published settings of SGD where it has none."""
    ledger_sha256: str
    """`Ledger.digest`: the moments at which each token was scored and learned."""
    compliance: Compliance


Make = Callable[[GPT, RunConfig, torch.dtype, int, Ranks], Adapter]


def _learns_in_documents(config: RunConfig) -> bool:
    """Whether SGD learns from rows of documents, not from sequences that cross them."""
    return config.eval.ttt.kind == "phased" or config.eval.document_aware


def make_adapter(model: GPT, config: RunConfig, dtype: torch.dtype, document_start: int, ranks: Ranks) -> Adapter:
    """The adapter of config.eval.ttt. It gets no text."""
    ttt = config.eval.ttt
    if ttt.kind == "lora":
        base = functools.partial(prepared, model, dtype)
        return DocumentLoRA(model.config, ttt.lora, base, device=ranks.device, seed=config.seed)
    sgd = SGD(
        model,
        ttt.sgd,
        length=config.window,
        dtype=dtype,
        ranks=ranks,
        document_start=document_start if _learns_in_documents(config) else None,
        most=batch_windows(config, ranks),
        compiled=compiles(config, ranks),
    )
    if ttt.kind == "sgd":
        return sgd
    return PhasedLoRA(DocumentLoRA(model.config, ttt.lora, sgd.weights, device=ranks.device, seed=config.seed), sgd)


def learned_shapes(config: RunConfig, ranks: Ranks) -> list[tuple[int, ...]]:
    """Some of the shapes in which attention runs backward, as `select_backend` takes them: of LoRAs the first chunk,
    the window, and an odd length, which the last chunk of a document may have."""
    ttt, window, out = config.eval.ttt, config.window, []
    if ttt.kind in ("lora", "phased"):
        lengths = {ttt.lora.chunk_tokens, window, (window - 1) | 1}
        out += [(ttt.lora.documents, length) for length in sorted(lengths)]
    if ttt.kind in ("sgd", "phased"):
        most = min(batch_windows(config, ranks), ttt.sgd.batch_sequences)
        out.append((1, most * window, window) if _learns_in_documents(config) else (most, window))
    return out


def evaluate_adapted(
    model: GPT,
    dataset: Dataset,
    config: RunConfig,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
    deferred: AbstractContextManager[Callable[[], None]] = _AT_ONCE,
    make: Make = make_adapter,
) -> AdaptedScore:
    """Score the validation split with test-time training as in config.eval.ttt, whose kind is not "off"; `model` stays
    as it is.

    `progress` gets a line every second, `say` one about what is scored where a signal ends it. On several ranks signals
    are `deferred` to where all meet, so that none leaves the others in a collective; what it gives raises then. Raises
    InputError for a plan that does not fit the text, BudgetError where eval.ttt.max_seconds are over before a token is
    scored, VerificationError where a check or a proof fails, Interrupted after a signal. A number that is not finite
    ends it with a score of what was scored before (`diverged`).
    """
    began, ttt = time.perf_counter(), config.eval.ttt
    ttt = with_published(ttt)
    config = replace(config, eval=replace(config.eval, ttt=ttt))
    windows, bos = plan_windows(dataset, config), dataset.need_tokenizer().bos_id
    aware, compiled, by_windows = config.eval.document_aware, compiles(config, ranks), ttt.kind == "sgd"
    document_start = bos if aware and by_windows else None
    scorer = Scorer(model, dtype, document_start=document_start, compiled=compiled, varied=not by_windows)
    read, targets = read_from(dataset, ranks.device), windows.targets
    ledger, sums, stopped, diverged, ended = Ledger(targets), Sums.start(0, ranks.device), None, False, False

    def expired() -> bool:
        return time.perf_counter() - began > ttt.max_seconds

    def late(stop: bool = False) -> bool:
        """Whether the ranks stop here: one wants to, or its clock is over. One that fails adds 1 instead of this."""
        nonlocal ended, stopped
        raise_caught()
        votes = float(ranks.sum_(torch.tensor(2.0**-10 * expired() + 2.0**-20 * stop, device=ranks.device)))
        if votes > 0.99:
            raise PeerError("another rank stopped with an error")
        ended = votes > 0
        if ended and stopped is None:
            diverging = int(votes * 2**20) % 2**10  # ranks
            over = f"eval.ttt.max_seconds {ttt.max_seconds:g} are over"
            stopped = "the weights of another rank diverged" if diverging else over
        return ended

    def so_far() -> str:
        nats, tokens, nbytes = sums.read()
        rate = f"{bits_per_byte(nats, nbytes):.4f}" if nbytes else "none"
        return f"{tokens:,} of {targets:,} tokens scored with {ttt.kind} ({rate} bits per byte)"

    def make_for(config: RunConfig, ranks: Ranks) -> Adapter:
        return make(model, config, dtype, bos, ranks)

    with ranks.raise_on_any():
        dataset.check_token_ids(model.config.vocab_size, "val")
        published = dataset.published_bytes(1, targets + 1)
        planned = _plan(dataset, config, windows, bos, batch_windows(config, ranks), compiled)
        tokens = [np.arange(part.start, part.start + part.length) for part in planned.parts]
        text = torch.cat([read(run[0], run[-1] + 1) for run in tokens], dim=1)
        make_small = functools.partial(make_for, planned.small)
        sample = Sample(scorer, planned.short, make_small, text, np.concatenate(tokens), bos)
        found = sample.check(*planned.checked, independent=independence(ttt) == "yes")
    told = time.perf_counter()
    with deferred if ranks.world > 1 else _AT_ONCE as raise_caught:
        try:
            try:
                steps, adapter = planned.steps(ranks), make_for(config, ranks)
                for batch, logprobs in run(steps, scorer, adapter, ledger, read, ranks, late=late, expired=expired):
                    sums = sums.plus(0, batch, logprobs)
                    if time.perf_counter() - told >= PROGRESS_SECONDS:
                        told = time.perf_counter()
                        progress(f"{so_far()} in {told - began:.0f} s of at most {ttt.max_seconds:g}")
            except NonFiniteError as error:
                stopped, diverged = str(error), True
            if not ended:
                late(stop=diverged)
        except PeerError:
            raise
        except GolfError as error:
            if isinstance(error, Interrupted):
                say(f"interrupted: {so_far()}; the adapted weights are lost, so it starts over")
            ranks.raise_on_any_rank(error)
        nats, tokens, nbytes = ranks.sum_(sums.values.clone()).tolist()
        diverged = bool(ranks.sum_(torch.tensor(float(diverged), device=ranks.device)))
        ledger.merge(ranks)
    if int(tokens) == targets and not diverged:  # the clock was over in the last step
        stopped = None
    ledger.check(all_scored=stopped is None)
    if not nbytes:
        raise BudgetError(f"nothing was scored with test-time training: {stopped}; raise --eval.ttt.max-seconds")
    _prove(dataset, ledger, int(tokens), int(nbytes))
    valid, words = code_length(ttt)
    label = score_label(dataset, windows, aware or ttt.kind != "sgd").replace(
        "val_bpb", f"val_bpb (adapted: {ttt.kind})"
    )
    label += "" if valid else " (by length: not a code length of the text)"
    label += f" (stopped: {int(tokens):,} of {targets:,} tokens)" if stopped else ""
    return AdaptedScore(
        kind=ttt.kind,
        val_loss=nats / tokens,
        val_bpb=bits_per_byte(nats, int(nbytes)),
        nats=nats,
        tokens=int(tokens),
        bytes=int(nbytes),
        label=label,
        seconds=time.perf_counter() - began,
        max_seconds=ttt.max_seconds,
        partial=tokens < dataset.val_tokens - 1,
        stopped=stopped,
        diverged=diverged,
        dataset=dataset.digest,
        dtype=str(dtype).removeprefix("torch."),
        window=windows.window,
        stride=windows.stride,
        settings=asdict(ttt),
        ledger_sha256=ledger.digest,
        published_bpb=bits_per_byte(nats, published) if published and not stopped else None,
        compliance=Compliance(
            **found,
            scored_once=int((ledger.scored != NEVER).sum()),
            learned_after_scored=int((ledger.learned != NEVER).sum()),
            documents_independent=independence(ttt),
            order="stream" if ttt.kind == "sgd" else ttt.lora.order,
            code_length=words,
        ),
    )


def with_published(ttt: TTTConfig) -> TTTConfig:
    """`ttt` with the PUBLISHED settings of SGD where it gives none."""
    sgd = {name: value for name, value in PUBLISHED.get(ttt.kind, {}).items() if getattr(ttt.sgd, name) is None}
    return replace(ttt, sgd=replace(ttt.sgd, **sgd))


def check_adapted(adapted: AdaptedScore | None) -> None:
    """Raises NonFiniteError if it diverged."""
    if adapted and adapted.diverged:
        raise NonFiniteError(
            f"test-time training diverged after {adapted.tokens:,} tokens, whose score is kept: {adapted.stopped}"
        )


def _prove(dataset: Dataset, ledger: Ledger, tokens: int, nbytes: int) -> None:
    """Raises VerificationError unless the sums are of the tokens in the ledger, and the text has proved bytes."""
    dataset.prove_val_bytes(len(ledger.scored) + 1)
    scored, count, size = ledger.scored != NEVER, 0, 1 << 22
    for low in range(0, len(scored), size):
        part = scored[low : low + size]
        count += int(dataset.byte_counts(low + 1, low + 1 + len(part))[part].sum(dtype=np.int64))
    if (tokens, nbytes) != (scored.sum(), count):
        raise VerificationError(
            f"summed {tokens} tokens and {nbytes} bytes, the ledger has {scored.sum()} and {count}: no score can be "
            "proved"
        )


class _Plan(NamedTuple):
    """An evaluation's plan, and a short one of the same kind for `Sample`."""

    steps: Callable[[Ranks], Iterable[Step]]
    short: Callable[[Ranks], Iterable[Step]]
    small: RunConfig
    """Of the short plan."""
    parts: Sequence[plan.Document]
    """Of the text, which the short plan scores."""
    checked: tuple[Sequence[plan.Document], Sequence[plan.Document], int]
    """What `Sample.check` takes."""


def adapted_steps(
    config: RunConfig, windows: Windows, documents: Sequence[plan.Document], most: int
) -> Callable[[Ranks], Iterable[Step]]:
    """What is scored and learned, in order: `windows` at most `most` at a time with kind sgd, else `documents`. Raises
    InputError for a text with too few documents for a phase."""
    ttt = config.eval.ttt
    if ttt.kind == "sgd":
        return functools.partial(plan.sliding, windows, ttt.sgd.chunk_tokens, windows.window, most)
    batches, texts = plan.batches_and_phases(documents, ttt)
    return functools.partial(plan.documents, batches, ttt.lora.chunk_tokens, config.window, phases=texts)


def _plan(dataset: Dataset, config: RunConfig, windows: Windows, bos: int, most: int, compiled: bool) -> _Plan:
    ttt, targets = config.eval.ttt, windows.targets

    def resized(window: int, chunk: int, **lora: int) -> RunConfig:
        small = replace(ttt, sgd=replace(ttt.sgd, chunk_tokens=chunk), lora=replace(ttt.lora, **lora))
        return replace(config, eval=replace(config.eval, window=window, stride=None, ttt=small))

    if ttt.kind == "sgd":
        window = windows.window
        few = Windows(min(CHUNKS * window, targets), window, windows.stride if compiled else window)
        text = [plan.Document(0, few.targets + 1)]
        return _Plan(
            adapted_steps(config, windows, [], most),
            functools.partial(plan.sliding, few, window, window, most),
            resized(window, window),
            text,
            ([], text, window),
        )
    chunk, window = ttt.lora.chunk_tokens, min(config.window, 2 * ttt.lora.chunk_tokens)
    documents = plan.find_documents(dataset.val_ids(0, targets + 1), bos)
    clipped = [d._replace(length=min(d.length, CHUNKS * chunk + 1)) for d in documents]
    clipped = [d for d in clipped if d.length > chunk + 1] or clipped
    chosen = [clipped[i] for i in np.unique(np.linspace(0, len(clipped) - 1, 2 * SAMPLE).astype(int))]
    ends = np.cumsum([d.length for d in chosen]).tolist()
    placed = [d._replace(start=end - d.length) for d, end in zip(chosen, ends, strict=True)]
    before, after = placed[1::2], placed[::2]
    # So that a phase has two chunks or more, if the documents are long enough, and learns from all but the last.
    chunk_tokens = max(window, min(4 * window, sum(document.length for document in before) // 2))
    learned = {0: before} if ttt.kind == "phased" and before else {}
    return _Plan(
        adapted_steps(config, windows, documents, most),
        functools.partial(plan.documents, [part for part in (before, after) if part], chunk, window, phases=learned),
        resized(window, chunk_tokens, documents=len(after)),
        chosen,
        (before, after, chunk),
    )
