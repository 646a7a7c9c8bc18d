"""What learns at test time, and the one loop that scores and lets it learn.

`run` owns the text and the order. Per step of a plan (`golfgpt.score.ttt.plan`), which is made before anything is
scored:

    weights = adapter.weights()                  fixed for the step
    log probabilities of its tokens              written to the ledger, and given to the caller
    adapter.adapt(those tokens)                  refused unless the ledger has them

An adapter has no way to ask for text, and what it gets are copies of the tokens, not views of a longer one. It returns
weights, never probabilities: softmax and targets are the scorer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from golfgpt.distributed import Ranks
from golfgpt.errors import NonFiniteError
from golfgpt.model.gpt import GPT, Weights
from golfgpt.model.linear import Weight
from golfgpt.score.ttt.ledger import Ledger
from golfgpt.score.windows import Batch, Read, Scorer


class Adapted(NamedTuple):
    """The weights that a step is scored with, in its dtype."""

    weights: Weights
    head: Weight
    """(vocab_size, D)."""


def prepared(model: GPT, dtype: torch.dtype, params: Mapping[str, Tensor] | None = None) -> Adapted:
    """The weights of `model`, or `params` in their place, without gradients."""
    values = {name: p.detach() for name, p in (params or dict(model.named_parameters())).items()}
    head = values["tok_emb" if model.config.tie_embeddings else "lm_head"]
    return Adapted(model.weights(dtype, values), head.to(dtype))


class Scored(NamedTuple):
    """Tokens that are scored, for an adapter to learn from: a chunk of some documents, or a text."""

    logprobs: Tensor | None = None
    """(b, s) float32 in nats, 0 where nothing was scored, with the graph of the forward that scored them."""
    again: Tensor | None = None
    """(b,) float32: 1 for documents that have a later chunk, else 0. Only these learn."""
    text: Tensor | None = None
    """(n,) int64: tokens of which each but the first of a run is scored."""
    part: tuple[int, int] = (0, 1)
    """Which of how many parts of the plan `text` is."""


class Adapter(Protocol):
    """What `run` asks for. The constructor prepares it, from the model and settings alone."""

    def reset(self, rows: int) -> None:
        """A batch of `rows` new documents begins."""

    def weights(self) -> Adapted:
        """The weights for the next step. If that learns from its own forward, called with gradients enabled."""

    def adapt(self, scored: Scored) -> None:
        """Learn. Raises NonFiniteError for a gradient that is not finite."""


class Step(NamedTuple):
    """What is scored with the same weights, and what is learned from it afterwards."""

    batches: Callable[[Read], Iterator[Batch]] = lambda read: iter(())
    rows: int | None = None
    """Documents that begin with this step."""
    again: Tensor | None = None
    """(b,) as `Scored.again`; None: nothing is learned from this forward."""
    text: tuple[range, ...] = ()
    """Runs of tokens that are learned, each but a run's first: every rank has these steps, at the same place."""
    part: tuple[int, int] = (0, 1)
    meets: bool = False
    """Whether every rank reaches this step, so that they can agree to stop before it."""


def targets_of(batch: Batch) -> Tensor:
    """(n,) int64 on the CPU: the scored targets of a batch, target t being token t + 1 of the text."""
    return batch.positions[batch.scored].cpu() - 1


def run(
    plan: Iterable[Step],
    scorer: Scorer,
    adapter: Adapter,
    ledger: Ledger,
    read: Read,
    ranks: Ranks,
    *,
    late: Callable[[], bool] = lambda: False,
    expired: Callable[[], bool] = lambda: False,
    swap: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[tuple[Batch, Tensor]]:
    """Score and adapt by `plan`; yields each batch with its log probabilities (b, s), which the ledger has by then.

    `late` is asked where all ranks meet; they stop when it is true. Between, a rank whose time is `expired` leaves its
    steps out. `swap` may exchange a batch's targets before they
    are scored (checks). Raises NonFiniteError for a log probability or gradient that is not finite, VerificationError
    for a token that is scored again or learned before it is scored.
    """
    for step in plan:
        if (step.meets or ranks.world == 1) and late():
            return
        if ranks.world > 1 and not step.meets and not step.text and expired():
            continue
        if step.rows is not None:
            adapter.reset(step.rows)
        learns = step.again is not None
        for i, batch in enumerate(map(swap, step.batches(read))):
            with torch.set_grad_enabled(learns):
                if i == 0:
                    scorer.use(*adapter.weights())
                logprobs = scorer(batch)
            bad = ~logprobs.isfinite() & batch.scored
            if bad.any():
                first = int(batch.positions[bad].min())
                raise NonFiniteError(f"the adapted weights give token {first} of the validation text no probability")
            ledger.score(targets_of(batch).numpy())
            yield batch, logprobs.detach()
            if learns:
                learned = batch._replace(scored=batch.scored & (step.again > 0)[:, None])
                ledger.learn(targets_of(learned).numpy())
                with torch.enable_grad():
                    adapter.adapt(Scored(logprobs=logprobs, again=step.again))
                del logprobs
        if step.text:
            if ranks.world > 1 and late():
                return
            ledger.share(ranks, step.text)
            ledger.learn_runs(step.text)
            text = torch.cat([read(run.start, run.stop)[0].clone() for run in step.text])
            with torch.enable_grad():
                adapter.adapt(Scored(text=text, part=step.part))
