"""How long a training step takes on this CPU, before one is taken: from trials of a few rows and of an update.

    forecast(step: TrainStep) -> Forecast           of a run that is set up; all ranks together
    forecast_recipe(config: RunConfig) -> Forecast  of a config without data, by one process: forecast_recipe(small)

str(Forecast) is "about 0.75 s for 4,096 tokens in float32". A step of the baseline, 524,288 tokens, takes 15
minutes on two cores, and its first microbatch two; the trials take seconds. On a GPU there is no forecast,
because a compiled step takes another time than what is tried here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from golfgpt.config import RunConfig
from golfgpt.distributed import Ranks
from golfgpt.train.step import TrainStep

SECONDS = 0.5
"""Spent on trials of each of two sizes, unless a single trial takes longer."""


@dataclass(frozen=True)
class Forecast:
    """How long a step takes that is neither compiled nor disturbed by another process."""

    seconds: float
    """Seconds of a whole step; with model.loop, of one with all its passes."""
    tokens: int
    """Tokens in the step, on all ranks."""
    tried: int
    """Tokens tried at once on each rank: from one row up to a microbatch."""
    dtype: str
    """Name of the dtype of the matmuls."""
    slower: str = ""
    """Why one thread was chosen, if it was: a sentence about the time with more."""

    def __str__(self) -> str:
        return f"about {_rounded(self.seconds)} s for {self.tokens:,} tokens in {self.dtype}"


def _rounded(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def forecast(step: TrainStep) -> Forecast:
    """The forecast of `step`, whose weights and optimizers are as before afterwards. All ranks must call it together;
    rank 0's times count. Where the run may choose its threads, one is tried too, and is used from here on if it is more
    than twice as fast: on two busy cores, a step of 3 s with one thread was forecast to take 125 s with two, which wait
    for each other."""
    runtime, threads = step.config.runtime, torch.get_num_threads()
    tries = step.ranks.broadcast_object([threads, 1] if runtime.threads == 0 and threads > 1 else [threads])
    found = []
    try:
        with step.undone():
            for count in tries:
                torch.set_num_threads(count)
                found.append(_measured(step))
    finally:
        torch.set_num_threads(threads)
    if 2 * found[-1].seconds >= found[0].seconds:
        return found[0]
    torch.set_num_threads(1)
    step.execute(replace(runtime, threads=1))
    return replace(found[-1], slower=f"{threads} threads were forecast to take {_rounded(found[0].seconds)} s a step")


def _measured(step: TrainStep) -> Forecast:
    """With the threads that torch has now."""
    data, optim = step.config.data, step.config.optim
    longest = data.microbatch // data.seq_len

    def rows(count: int) -> Callable[[], None]:
        ids = torch.arange(count * data.seq_len).remainder(step.config.model.vocab_size).view(count, -1)
        ids = ids.to(step.ranks.device)

        def work() -> None:
            loss = step.loss(ids, ids, None, True)
            step.flat.accumulate_(torch.autograd.grad(loss, step.compute_copies.leaves), first=True)

        return work

    count, seconds = 1, _least(rows(1))
    if longest > 1 and seconds < SECONDS:
        count = min(longest, math.ceil(SECONDS / seconds))
        seconds = _least(rows(count)) / count
    rounds = step.ranks.broadcast_object(2 if seconds < SECONDS else 1)  # ranks may exchange shards in an update
    update = _least(lambda: step.optimizers.step(1.0, optim.muon_momentum), rounds)
    mine = math.ceil(data.spans / step.ranks.world) * data.span_tokens // data.seq_len
    total = step.ranks.broadcast_object(seconds * mine + update)
    return Forecast(total, data.batch_tokens, count * data.seq_len, step.dtype_choice.name)


def forecast_recipe(config: RunConfig) -> Forecast:
    """The forecast of a step of `config` on the CPU, by this process alone, whose threads are as before afterwards.
    With runtime.dtype "auto" the dtype is chosen as a run chooses it."""
    text = torch.arange(2 * config.data.seq_len).remainder(config.model.vocab_size).numpy().astype("uint16")
    data = replace(config.data, path=None, order="sequential", document_start=None)
    step = TrainStep(replace(config, data=data), SimpleNamespace(train=[text]), Ranks(0, 1, torch.device("cpu")))
    threads = torch.get_num_threads()
    try:
        return forecast(step)
    finally:
        torch.set_num_threads(threads)
        step.data.close()


def _least(work: Callable[[], None], rounds: int | None = None) -> float:
    """Seconds of the fastest of `rounds` executions; None: of up to three within SECONDS."""
    times: list[float] = []
    while len(times) < (rounds or 3) and (rounds or sum(times) < SECONDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
