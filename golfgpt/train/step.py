"""One training step on one rank: read spans, sum gradients over ranks, update, without waiting for the device.

The gradients of this rank's spans accumulate in views of one flat buffer. One all-reduce (or its sharded equivalent)
sums them over ranks, together with the loss, rank 0's clock and the votes. Every rank then takes the same update. A
step reads `data.spans` spans of span_tokens tokens, which are divided among the ranks. One rank or eight therefore
see the same tokens. Gradients are token-weighted sums, so they agree within rounding.

On a GPU, `backward`, `sum` and `update` only enqueue work. `wait` reads the result of a step after the next one is
enqueued, so decisions lag by a step. The learning rate uses the last clock of rank 0 that has been read, extrapolated
by the duration of the last known step; the value is the same on every rank. A vote to stop includes the steps that are
already enqueued. On a CPU, nothing is asynchronous and nothing lags.

The device decides whether loss and gradient are finite. From the first step in which they are not, no update changes
anything, until the host reads the result and ends the run.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from golfgpt.config import RunConfig, RuntimeConfig, ScheduleConfig
from golfgpt.data.shards import Dataset
from golfgpt.data.stream import Prefetcher, Tokens, spans_of_rank
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError, NonFiniteError
from golfgpt.model.gpt import GPT
from golfgpt.model.segments import Segments
from golfgpt.optim.averaging import Average
from golfgpt.optim.flat import FlatGradients
from golfgpt.optim.optimizers import Optimizers, by_muon, record_graph
from golfgpt.optim.schedule import (
    budget_used,
    lr_multiplier,
    muon_momentum,
    quantization_aware,
    weight_decay_factor,
)
from golfgpt.quant.compute_copies import ComputeCopies
from golfgpt.quant.quantizer import Quantizer
from golfgpt.train.clock import Pace
from golfgpt.train.compile_cache import compile_loss, deterministic
from golfgpt.train.compute_dtype import select_dtype

_CONTROL = 6  # loss, clock, stop, save, signaled, abandoned


class Votes(NamedTuple):
    """What a rank sends with its gradients. For `stop` and `save`, only the vote of rank 0 counts."""

    stop: bool = False
    """A step after those already enqueued could cross the cap."""
    save: bool = False
    """A checkpoint is due."""
    signaled: bool = False
    """This rank received a signal to stop."""
    abandoned: bool = False
    """This rank left the step before its last microbatch: no rank applies it, nor any step after it."""


NO_VOTES = Votes()


@dataclass(frozen=True)
class StepResult:
    """Values that are equal on all ranks after the gradients of a step are summed."""

    loss: float
    """Mean loss over the tokens of the step, in nats."""
    seconds: float
    """Rank 0's training clock at the start of the step."""
    stop: bool
    """Rank 0 estimates that a step after those already enqueued could cross the cap."""
    save: bool
    """A checkpoint is due by rank 0's clock."""
    signaled: bool
    """Some rank received a signal to stop."""
    abandoned: bool
    """Some rank left the step before its last microbatch, so nothing was updated."""
    grad_norm: float
    """Global gradient norm before clipping; of spans that are clipped one by one, after it."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Pending:
    """An enqueued step."""

    step: int
    looping: bool
    """Whether it had all passes of model.loop."""
    layers: int
    """Layers that ran."""
    norm: Tensor
    """Norm of the summed gradients, 0-d, on the device."""
    values: Tensor
    """Loss, clock, votes and gradient norm. They are on the host after the event `copied`."""
    copied: torch.cuda.Event | None

    def result(self) -> StepResult:
        """Wait for the device and return the result."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, seconds, stop, save, signaled, abandoned, norm = self.values.tolist()
        return StepResult(loss, seconds, stop > 0, save > 0, signaled > 0, abandoned > 0, norm)


class TrainStep:
    """Model, optimizers, data and gradient buffer of one rank, and the training step that uses them."""

    config: RunConfig

    def __init__(self, config: RunConfig, dataset: Dataset, ranks: Ranks):
        """Raises InputError for a configuration that does not fit the ranks or the device."""
        if ranks.world > config.data.spans:
            raise InputError(
                f"got {ranks.world} ranks; expected at most data.spans = {config.data.spans}, because each rank reads "
                f"at least one span: raise --data.spans to at least {ranks.world}, or use fewer ranks"
            )
        self.config, self.ranks = config, ranks
        self.cuda = ranks.device.type == "cuda"
        self.model = GPT(config.model, seed=config.seed).to(ranks.device)
        self.dtype_choice = select_dtype(config.runtime.dtype, self.model, config.data, ranks)
        self.dtype = self.dtype_choice.dtype
        sharded = config.runtime.optimizer == "sharded"
        matrices = by_muon(self.model.table, config.optim)
        self.flat = FlatGradients(self.model, ranks, sharded=sharded, control=_CONTROL, matrices=matrices)
        named, quant = dict(self.model.named_parameters()), config.quant
        scheduled = quant.qat_start > 0 or quant.qat_below_lr < 1
        self._enabled = torch.zeros((), dtype=torch.bool, device=ranks.device) if scheduled else None
        quantizer = Quantizer(config.model, quant)
        self.compute_copies = ComputeCopies(self.model, quantizer.fake_quant() or None, self.dtype, self._enabled)
        self.optimizers = Optimizers(self.model, config.optim, self.flat, self.compute_copies, self.dtype)
        self.average = Average(named, config.average, self.optimizers.bf16_params)
        assigned = spans_of_rank(ranks.rank, ranks.world, config.data.spans)
        self.data = Prefetcher(dataset.train, config.data, assigned, pin=self.cuda)
        self.pace = Pace(config.schedule, self.ahead)
        self._loss_sum = torch.zeros((), device=ranks.device)
        self._compiled: dict[tuple[str, str], Callable] = {}
        self.execute(config.runtime)

    def execute(self, runtime: RuntimeConfig) -> None:
        """Compile and replay the steps from now on as `runtime` says. It concerns this object only: threads, kernels
        and the attention backend are the process's. Graphs are captured by `capture`. Raises InputError for graphs
        without a GPU, compilation or warm-up."""
        self.compiled = runtime.compile == "on" or (runtime.compile == "auto" and self.cuda)
        if runtime.graph in ("optimizer", "step") and not (self.compiled and self.cuda and runtime.warmup_steps):
            raise InputError(
                f"runtime.graph {runtime.graph} expected a GPU, compilation and warmup_steps >= 1, got device "
                f"{self.ranks.device}, compile {self.compiled}, warmup_steps {runtime.warmup_steps}; change these or "
                "drop it"
            )
        self.config = replace(self.config, runtime=runtime)
        self._loss = self.loss
        if self.compiled:  # once for each way to lower it, so that ways can take turns
            way = runtime.kernels, runtime.attention
            if way not in self._compiled:
                self._compiled[way] = compile_loss(self.loss, self.ranks.device)
            self._loss = self._compiled[way]
        self.optimizers.release()
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        """Forward and backward, by `looping`."""

    def reschedule(self, schedule: ScheduleConfig) -> None:
        """Take another schedule, before the first step."""
        self.config = replace(self.config, schedule=schedule)
        self.pace = Pace(schedule, self.ahead)

    def loss(self, ids: Tensor, targets: Tensor, segments: Segments | None, looping: bool) -> Tensor:
        """Mean loss in nats of targets (B, T) given ids (B, T), computed with the compute copies of the weights.
        `segments` as in GPT.forward; `looping`: with all passes of model.loop."""
        stand_ins = self.compute_copies.stand_ins()
        packed = segments if self.config.data.order == "packed" else None
        return self.model.loss(ids, targets, dtype=self.dtype, stand_ins=stand_ins, segments=packed, looping=looping)

    def exported(self) -> dict[str, Tensor]:
        """The weights to export, on the CPU: the average if there is one, else the parameters."""
        state = {name: value.cpu() for name, value in self.model.state_dict().items()}
        return state | {name: value.cpu() for name, value in self.average.weights().items()}

    @property
    def ahead(self) -> int:
        """Number of steps that may be pending when another one is enqueued."""
        return int(self.cuda)

    def budget_used(self, step: int) -> float:
        """Fraction of the training budget that `step` completed steps have used."""
        return budget_used(step, self.pace.seconds_at(step), self.config.schedule)

    def multiplier(self, step: int) -> float:
        """Factor on the learning rates of the step after `step` completed ones."""
        return lr_multiplier(step, self.pace.seconds_at(step), self.config.schedule)

    def quantization_aware(self, step: int) -> bool:
        """Whether the forward of the step after `step` completed ones is fake-quantized."""
        return quantization_aware(self.budget_used(step), self.multiplier(step), self.config.quant)

    def looping(self, step: int) -> bool:
        """Whether the step after `step` completed ones has all passes of model.loop."""
        return self.budget_used(step) >= self.config.model.loop.start

    def layers(self, step: int) -> int:
        """Layers that run in the step after `step` completed ones."""
        return len(self.model.plans[self.looping(step)])

    def prepare(self, step: int) -> None:
        """Prepare the compute copies for `step`, at the start and after loading weights; else `update` does it."""
        if self._enabled is not None:
            self._enabled.fill_(self.quantization_aware(step))
        self.compute_copies.refresh()

    def launch(self, step: int, *, looping: bool | None = None) -> Pending:
        """Run `backward` for all microbatches, then `sum`."""
        for _ in self.backward(step, looping):
            pass
        return self.sum(step)

    def backward(self, step: int, looping: bool | None = None) -> Iterator[tuple[int, int]]:
        """Forward and backward of this rank's spans of step number `step`. Before each microbatch, yields the number of
        completed microbatches and their total. `looping` is for rehearsals; None: as the schedule says."""
        if self.compute_copies.stale():
            self.prepare(step)
        tokens = self.data.read(step)
        self._looping = looping = self.looping(step) if looping is None else looping
        if looping in self._graphs and self._tokens.hold(tokens):
            yield 0, 1
            self._tokens.copy_(tokens)
            self._graphs[looping].replay()
        else:
            yield from self._accumulate(tokens.to(self.ranks.device), looping)

    def _accumulate(self, tokens: Tokens, looping: bool) -> Iterator[tuple[int, int]]:
        """Sum the gradients of this rank's spans of `tokens`, on the device; yields as `backward`."""
        data, optim = self.config.data, self.config.optim
        self._loss_sum.zero_()
        length = data.row_tokens
        ids, targets = (t.reshape(-1, length) for t in (tokens.windows[:, :-1], tokens.windows[:, 1:]))
        rows = data.microbatch // length
        batches = list(zip(ids.split(rows), targets.split(rows), strict=True))
        by_span = optim.grad_clip == "span" and optim.grad_clip_norm > 0
        group = data.span_tokens // data.microbatch if by_span else len(batches)
        total = None
        for done, (x, y) in enumerate(batches):
            yield done, len(batches)
            segments = None
            if data.order == "packed":
                segments = Segments.of(tokens.boundaries[done], length, data.seq_len, self.dtype)
                if self.compiled:
                    torch._dynamo.maybe_mark_dynamic(segments.boundaries, 0)
            with deterministic() if self.compiled and not self.cuda else contextlib.nullcontext():
                part = self._loss(x, y, segments, looping) * (y.numel() / data.batch_tokens)
                gradients = torch.autograd.grad(part, self.compute_copies.leaves)
            self.flat.accumulate_(gradients, first=done % group == 0)
            self._loss_sum += part.detach()
            if by_span and (done + 1) % group == 0:
                self.flat.clip_(optim.grad_clip_norm, data.spans)
                if group < len(batches):
                    total = self.flat.gradients.clone() if total is None else total.add_(self.flat.gradients)
        if total is not None:
            self.flat.gradients.copy_(total)

    def sum(self, step: int, seconds: float = 0.0, votes: Votes = NO_VOTES) -> Pending:
        """Sum the gradients of `backward` over ranks, together with the loss, the training clock `seconds` of rank 0
        and the `votes`."""
        clock = (seconds, votes.stop, votes.save) if self.ranks.is_main else (0.0, False, False)
        control = torch.tensor([0.0, *clock, votes.signaled, votes.abandoned], pin_memory=self.cuda)
        if votes.abandoned:
            self._loss_sum.fill_(math.nan)  # for which no rank updates anything
        self.flat.control.copy_(control, non_blocking=True)
        self.flat.control[0] = self._loss_sum
        self.flat.sum_()
        norm = self.flat.norm()
        self.optimizers.ok.logical_and_((norm + self.flat.control[0]).isfinite())
        values = torch.empty(_CONTROL + 1, pin_memory=self.cuda)
        values.copy_(torch.cat((self.flat.control, norm[None])), non_blocking=True)
        copied = torch.cuda.Event() if self.cuda else None
        if copied is not None:
            copied.record()
        if not self.ahead:
            self.pace.sync(step, float(values[1]))
        return Pending(step, self._looping, len(self.model.plans[self._looping]), norm, values, copied)

    def update(self, pending: Pending) -> float:
        """Clip, update all parameters and the average, and prepare the weights for the next step. Returns the
        learning-rate multiplier. If the loss or a gradient was not finite in this or an earlier step, nothing
        changes."""
        step, limit = pending.step, self.config.optim.grad_clip_norm
        if limit and self.config.optim.grad_clip == "step":
            self.flat.gradients.mul_((limit / (pending.norm + 1e-6)).clamp(max=1.0).nan_to_num(nan=1.0))
        multiplier = self.multiplier(step)
        if self._enabled is not None:
            self._enabled.fill_(self.quantization_aware(step + 1))
        decay = weight_decay_factor(self.budget_used(step), self.config.optim)
        self.optimizers.step(multiplier, muon_momentum(step, self.config.optim), decay)
        self.average.update(step + 1, multiplier, self.optimizers.ok)
        return multiplier

    def wait(self, pending: Pending) -> StepResult:
        """Wait for a step and return its result.

        Raises NonFiniteError if the loss or a gradient is not finite; the message names the first such tensor.
        Parameters and optimizer state are then as before that step.
        """
        result = pending.result()
        if not (result.finite or result.abandoned):
            if self.ahead:  # a later step has overwritten the gradients: compute them again
                self.launch(pending.step, looping=pending.looping)
            raise NonFiniteError(f"step {pending.step}: {self._culprit(result)} is not finite; nothing was updated")
        self.pace.sync(pending.step, result.seconds)
        return result

    def _culprit(self, result: StepResult) -> str:
        grads = {}
        for name, param in self.model.table.items():
            grad = getattr(self.model, name).grad
            grads |= zip(param.published_names, grad if param.layered else [grad], strict=True)
        # If sharded, a rank has only the sums of its shard, so the flags are summed over ranks.
        flags = torch.stack([~torch.isfinite(grad).all() for grad in grads.values()]).float()
        flags = self.ranks.sum_(flags).tolist()
        bad = [name for name, flag in zip(grads, flags, strict=True) if flag]
        loss = "" if math.isfinite(result.loss) else f"the loss ({result.loss})"
        grad = f"the gradient of {bad[0]} ({len(bad)} of {len(grads)} tensors)" if bad else ""
        return " and ".join(filter(None, (loss, grad))) or f"the gradient norm ({result.grad_norm})"

    def check_finite(self) -> None:
        """Raises NonFiniteError if the last update made a parameter NaN or infinite; the message names it."""
        for name, p in self.model.named_parameters():
            if not torch.isfinite(p).all():
                raise NonFiniteError(f"parameter {name} is not finite after the last update; nothing was exported")

    def capture(self) -> None:
        """Capture what runtime.graph names. Every kernel must be compiled, by a step like those that follow. Nothing is
        executed."""
        replayed = self.config.runtime.graph
        if replayed == "step":
            torch.cuda.empty_cache()  # the graph keeps its own memory, as much as a step outside needed
            self._tokens = self.data.read(0).to(self.ranks.device).with_room()
            pool = None  # one for both: they never run at once, and the first is the larger
            for looping in reversed(self.ways()):
                work = partial(self._accumulate, self._tokens, looping)
                self._graphs[looping] = graph = record_graph(lambda work=work: deque(work(), 0), pool)
                pool = graph.pool()
        if replayed in ("optimizer", "step"):
            self.optimizers.capture()

    def ways(self) -> tuple[bool, ...]:
        """The values of `looping` that the run has."""
        return (False, True) if self.config.model.loop.start else (True,)

    def rehearse(self, looping: bool | None = None) -> None:
        """Take step 0, for its time or its compilation. Only in `undone`."""
        self.launch(0, looping=looping)
        self.optimizers.step(1.0, self.config.optim.muon_momentum)

    def overwritten(self, looping: bool) -> str | None:
        """The first weight that forward and backward of step 0 change, although they only read it; None if they change
        none. torch 2.13 can compile a backward that does (LOG.md). Only in `undone`."""
        weights = [*self.model.named_parameters(), *self.compute_copies.banks.items()]
        before = [weight.detach().clone() for _, weight in weights]
        for _ in self.backward(0, looping):
            pass
        changed = (name for (name, weight), old in zip(weights, before, strict=True) if not torch.equal(weight, old))
        return next(changed, None)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Parameters, optimizers, votes and clock are after the block what they were before it."""
        enabled = None if self._enabled is None else self._enabled.clone()
        model = {k: v.clone() for k, v in self.model.state_dict().items()}
        optimizers = {k: v.clone() for k, v in self.optimizers.state().items()}
        known = self.pace.known
        self.prepare(0)
        try:
            yield
        finally:
            self.model.load_state_dict(model)
            self.optimizers.load_state(optimizers)
            self.optimizers.ok.fill_(True)
            self.pace.known = known
            if enabled is not None:  # a resumed run may be past the start of fake quantization
                self._enabled.copy_(enabled)

    def warm_up(self, steps: int, say: Callable[[str], None] = lambda text: None) -> None:
        """Run `steps` full steps to compile everything, then undo them, and capture the graphs; the same again with
        the loop, if it begins later. `say` receives a progress message for each step."""
        with self.undone():
            for looping in self.ways():  # no compilation is left for the step at which the loop begins
                for step in range(steps):
                    say(f"compiling and warming up ({step + 1} of {steps})")
                    self.rehearse(looping)
            self.capture()
