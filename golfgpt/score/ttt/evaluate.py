"""The adapted score: bits per byte of the validation text with weights that learn from what is scored already.

It stands beside the plain score (`golfgpt.score.evaluate`), never in its place, and names its kind. Like that it is
proved: tokens and bytes are counted twice, and `compliance` says what was checked. The clock stops it between two
steps; what is scored by then is kept, as it is where the learning rate makes the weights diverge.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from golfgpt.bpb import bits_per_byte
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.distributed import Ranks
from golfgpt.errors import GolfError, Interrupted, NonFiniteError, PeerError, VerificationError
from golfgpt.model.gpt import GPT
from golfgpt.score.evaluate import PROGRESS_SECONDS, batch_windows, plan_windows, read_from, score_label
from golfgpt.score.sums import Sums
from golfgpt.score.ttt import plan
from golfgpt.score.ttt.adapter import Adapter, Step, prepared, run
from golfgpt.score.ttt.compliance import (
    CHUNKS,
    SAMPLE,
    Compliance,
    Sample,
    check_documents,
    check_text,
    code_length,
    independence,
)
from golfgpt.score.ttt.ledger import NEVER, Ledger
from golfgpt.score.ttt.lora import DocumentLoRA, PhasedLoRA
from golfgpt.score.ttt.sgd import SGD
from golfgpt.score.windows import Read, Scorer, Windows

PUBLISHED = {"sgd": {"lr": 0.005, "epochs": 3}, "phased": {"lr": 0.001, "epochs": 1}}
"""What settings of SGD are by default."""
_STOP, _FAILED = 1e-3, 1.0  # of a rank in a vote


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
    ledger_sha256: str
    """`Ledger.digest`: the moments at which each token was scored and learned."""
    compliance: Compliance


Make = Callable[[GPT, RunConfig, torch.dtype, int, Ranks], Adapter]


def make_adapter(model: GPT, config: RunConfig, dtype: torch.dtype, document_start: int, ranks: Ranks) -> Adapter:
    """The adapter of config.eval.ttt. It gets no text."""
    ttt = config.eval.ttt
    packed = document_start if ttt.kind == "phased" or config.eval.document_aware else None
    if ttt.kind == "lora":
        base = functools.partial(prepared, model, dtype)
        return DocumentLoRA(model.config, ttt.lora, base, device=ranks.device, seed=config.seed)
    sgd = SGD(model, ttt.sgd, length=config.window, dtype=dtype, ranks=ranks, document_start=packed)
    if ttt.kind == "sgd":
        return sgd
    return PhasedLoRA(DocumentLoRA(model.config, ttt.lora, sgd.weights, device=ranks.device, seed=config.seed), sgd)


def evaluate_adapted(
    model: GPT,
    dataset: Dataset,
    config: RunConfig,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
    make: Make = make_adapter,
) -> AdaptedScore:
    """Score the validation split with test-time training as in config.eval.ttt, whose kind is not "off"; `model` stays
    as it is.

    `progress` gets a line every second, `say` one about what is scored where a signal ends it. Raises InputError for a
    plan that does not fit the text, VerificationError where a check or a proof fails, Interrupted after a signal. A
    number that is not finite ends it with a score of what was scored before (`diverged`).
    """
    began = time.perf_counter()
    ttt = config.eval.ttt
    sgd = {name: value for name, value in PUBLISHED.get(ttt.kind, {}).items() if getattr(ttt.sgd, name) is None}
    ttt = replace(ttt, sgd=replace(ttt.sgd, **sgd))
    config = replace(config, eval=replace(config.eval, ttt=ttt))
    windows = plan_windows(dataset, config)
    targets, bos = windows.targets, dataset.need_tokenizer().bos_id
    aware, compile = config.eval.document_aware, config.runtime.compile
    scorer = Scorer(
        model,
        dtype,
        document_start=bos if aware and ttt.kind == "sgd" else None,
        compiled=ttt.kind == "sgd" and (compile == "on" or (compile == "auto" and ranks.device.type == "cuda")),
    )
    read, ledger, sums = read_from(dataset, ranks.device), Ledger(targets), Sums.start(0, ranks.device)
    dataset.check_token_ids(model.config.vocab_size, "val")
    stopped, diverged, ended = None, False, False

    def late(stop: bool = False) -> bool:
        """Whether the ranks stop here: one wants to, or its clock is over."""
        nonlocal ended, stopped
        over = time.perf_counter() - began > ttt.max_seconds
        votes = float(ranks.sum_(torch.tensor(_STOP if over or stop else 0.0, device=ranks.device)))
        if votes >= 0.999 * _FAILED:
            raise PeerError("another rank stopped with an error")
        ended = votes > 0
        if ended and stopped is None:
            stopped = f"eval.ttt.max_seconds {ttt.max_seconds:g} are over" if over else "another rank stopped"
        return ended

    def scored_so_far(sums: Sums) -> str:
        nats, tokens, nbytes = sums.read()
        rate = f"{bits_per_byte(nats, nbytes):.4f}" if nbytes else "none"
        return f"{tokens:,} of {targets:,} tokens scored with {ttt.kind} ({rate} bits per byte)"

    try:
        with ranks.raise_on_any():
            steps, found = _plan_and_check(model, dataset, config, ranks, scorer, read, windows, dtype, bos, make)
        adapter, told = make(model, config, dtype, bos, ranks), time.perf_counter()
        try:
            for batch, logprobs in run(steps, scorer, adapter, ledger, read, ranks, late=late):
                sums = sums.plus(0, batch, logprobs)
                if time.perf_counter() - told >= PROGRESS_SECONDS:
                    told = time.perf_counter()
                    progress(f"{scored_so_far(sums)} in {told - began:.0f} s of at most {ttt.max_seconds:g}")
        except NonFiniteError as error:
            stopped, diverged = str(error), True
    except PeerError:
        raise
    except GolfError as error:
        if isinstance(error, Interrupted):
            say(f"interrupted: {scored_so_far(sums)}; the adapted weights are lost, so it starts over")
        ranks.raise_on_any_rank(error)
    if not ended:
        late(stop=diverged)
    nats, tokens, nbytes = ranks.sum_(sums.values.clone()).tolist()
    diverged = bool(ranks.sum_(torch.tensor(float(diverged), device=ranks.device)))
    ledger.merge(ranks)
    ledger.check(all_scored=stopped is None)
    if not nbytes:
        raise VerificationError(f"nothing was scored with test-time training: {stopped}")
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
        ledger_sha256=ledger.digest,
        compliance=Compliance(
            **found,
            scored_once=int((ledger.scored != NEVER).sum()),
            learned_after_scored=int((ledger.learned != NEVER).sum()),
            documents_independent=independence(ttt),
            order="stream" if ttt.kind == "sgd" else ttt.lora.order,
            code_length=words,
        ),
    )


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


def _plan_and_check(
    model: GPT,
    dataset: Dataset,
    config: RunConfig,
    ranks: Ranks,
    scorer: Scorer,
    read: Read,
    windows: Windows,
    dtype: torch.dtype,
    bos: int,
    make: Make,
) -> tuple[Iterator[Step], dict[str, float | int | None]]:
    """The steps of this rank, and the fields of `Compliance` that `compliance` finds on a sample."""
    ttt, most, targets = config.eval.ttt, batch_windows(config, ranks), windows.targets

    def sample(small: RunConfig, steps: Callable[[Ranks], Iterable[Step]], parts: Sequence[plan.Document]) -> Sample:
        """Of these parts of the text."""
        text = torch.cat([read(part.start, part.start + part.length) for part in parts], dim=1)
        origin = np.concatenate([np.arange(part.start, part.start + part.length) for part in parts])
        return Sample(scorer, steps, lambda alone: make(model, small, dtype, bos, alone), text, origin, bos)

    def resized(window: int, chunk: int, **lora: int) -> RunConfig:
        small = replace(ttt, sgd=replace(ttt.sgd, chunk_tokens=chunk), lora=replace(ttt.lora, **lora))
        return replace(config, eval=replace(config.eval, window=window, stride=None, ttt=small))

    if ttt.kind == "sgd":
        window = windows.window
        few = Windows(min(CHUNKS * window, targets), window, windows.stride if scorer.compiled else window)
        checked = sample(
            resized(window, window),
            lambda alone: plan.sliding(few, window, window, most, alone),
            [plan.Document(0, few.targets + 1)],
        )
        return plan.sliding(windows, ttt.sgd.chunk_tokens, window, most, ranks), check_text(checked, window)

    chunk, window = ttt.lora.chunk_tokens, min(config.window, 2 * ttt.lora.chunk_tokens)
    documents = plan.find_documents(dataset.val_ids(0, targets + 1), bos)
    batches, texts = plan.document_batches(documents, ttt.lora), {}
    if ttt.kind == "phased":
        texts = plan.phase_texts(batches, ttt.phases, ttt.phase_documents, ttt.lora.order)
    clipped = [d._replace(length=min(d.length, CHUNKS * chunk + 1)) for d in documents]
    clipped = [d for d in clipped if d.length > chunk + 1] or clipped
    chosen = [clipped[i] for i in np.unique(np.linspace(0, len(clipped) - 1, 2 * SAMPLE).astype(int))]
    ends = np.cumsum([d.length for d in chosen]).tolist()
    placed = [d._replace(start=end - d.length) for d, end in zip(chosen, ends, strict=True)]
    before, after = placed[1::2], placed[::2]
    learned = {0: before} if ttt.kind == "phased" and before else {}
    checked = sample(
        resized(window, 4 * window, documents=len(after)),  # sequences enough for a phase of two chunks and more
        lambda alone: plan.documents([part for part in (before, after) if part], chunk, window, alone, learned),
        chosen,
    )
    found = check_documents(checked, before, after, chunk, independent=independence(ttt) == "yes")
    return plan.documents(batches, chunk, config.window, ranks, texts), found
