"""One training step on one rank: spans in, summed gradients, one update.

Gradients of this rank's spans accumulate in views of one flat buffer; one all-reduce (or its sharded
equivalent) sums them together with the loss, rank 0's clock and its votes; every rank then takes the same
update. The learning rate of a step is decided by rank 0's clock, so ranks never drift apart, and the vote to
stop travels a step ahead, so nobody waits for a decision.

A step reads `data.spans` spans of span_tokens + 1 tokens. They are dealt to the ranks, so one rank or eight
see the same tokens, and gradients are token-weighted sums, so they agree within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from golfgpt.averaging import Average
from golfgpt.config import RunConfig
from golfgpt.data.shards import Dataset
from golfgpt.data.streams import TokenStream, spans_of_rank, step_spans
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError, NonFiniteError
from golfgpt.flat import FlatGradients
from golfgpt.model import GPT, MATRIX_BANKS
from golfgpt.optim import Optimizers
from golfgpt.quant import Quantizer
from golfgpt.schedule import budget_used, lr_multiplier, muon_momentum, quantization_aware
from golfgpt.upstream import to_upstream

_CONTROL = 5  # loss, clock, stop, save, signaled


@dataclass(frozen=True)
class StepResult:
    """What all ranks agree on after the gradients of a step are summed."""

    loss: float
    """Mean nats over the step's tokens."""
    seconds: float
    """Rank 0's training clock at the start of the step."""
    stop: bool
    """Rank 0 expects that one more step could cross the cap."""
    save: bool
    """Rank 0's clock says that a checkpoint is due."""
    signaled: bool
    """Some rank was told to stop."""
    grad_norm: float
    """Global norm before clipping."""


class Trainer:
    """Model, optimizers, data and the flat gradient buffer of one rank."""

    def __init__(self, config: RunConfig, dataset: Dataset, ranks: Ranks):
        if ranks.world > config.data.spans:
            raise InputError(
                f"{ranks.world} ranks, but a step has data.spans = {config.data.spans} spans to deal; "
                f"raise --data.spans to at least {ranks.world}"
            )
        self.config, self.ranks = config, ranks
        self.dtype = compute_dtype(config, ranks)
        self.model = GPT(config.model, seed=config.seed).to(ranks.device)
        sharded = config.runtime.optimizer == "sharded"
        self.flat = FlatGradients(self.model, MATRIX_BANKS, ranks, sharded=sharded, control=_CONTROL)
        self.optimizers = Optimizers(self.model, config.optim, self.flat)
        self.stream = TokenStream(dataset.train)
        self.compiled = config.runtime.compile == "on" or (
            config.runtime.compile == "auto" and ranks.device.type == "cuda"
        )
        if config.runtime.optimizer_graph and not (
            self.compiled and ranks.device.type == "cuda" and config.runtime.warmup_steps
        ):
            raise InputError(
                f"runtime.optimizer_graph is captured in the warm-up of a compiled run on a GPU; got device "
                f"{ranks.device}, compile {self.compiled}, warmup_steps {config.runtime.warmup_steps}"
            )
        self._loss = torch.compile(self.model.loss, dynamic=False, fullgraph=True) if self.compiled else self.model.loss
        named = dict(self.model.named_parameters())
        self.average = Average(named, config.average, self.optimizers.narrow)
        self.clock = 0.0
        """Rank 0's training clock at the start of the step before, which all ranks know."""
        quant = config.quant
        scheduled = quant.qat_start > 0 or quant.qat_below_lr < 1
        self._enabled = torch.zeros((), dtype=torch.bool, device=ranks.device) if scheduled else None
        self._fake_quant = Quantizer(config.model, quant).fake_quant(self._enabled)

    def accumulate(
        self,
        step: int,
        seconds: float = 0.0,
        votes: Callable[[], tuple[bool, bool, bool]] = lambda: (False, False, False),
    ) -> StepResult:
        """Sum the gradients of step number `step` over all spans and ranks.

        `seconds` is this rank's training clock; `votes` is asked for (stop, save, signaled) after the
        backward; of the first two, rank 0's count.
        """
        data = self.config.data
        if self._enabled is not None:
            self._enabled.fill_(self.quantization_aware(step))
        self.flat.zero_()
        loss = torch.zeros((), device=self.ranks.device)
        positions = step_spans(step, data.batch_tokens, data.spans)
        spans = [
            torch.from_numpy(self.stream.read(positions[span], data.span_tokens + 1).astype("int64"))
            for span in spans_of_rank(self.ranks.rank, self.ranks.world, data.spans)
        ]
        tokens = torch.stack(spans).to(self.ranks.device)
        ids, targets = (t.reshape(-1, data.seq_len) for t in (tokens[:, :-1], tokens[:, 1:]))
        rows = (data.microbatch_tokens or data.span_tokens) // data.seq_len
        for x, y in zip(ids.split(rows), targets.split(rows), strict=True):
            part = self._loss(x, y, dtype=self.dtype, fake_quant=self._fake_quant) * (y.numel() / data.batch_tokens)
            part.backward()
            loss += part.detach()
        stop, save, signaled = votes()
        clock = (seconds, stop, save) if self.ranks.main else (0.0, False, False)
        self.flat.control.copy_(torch.tensor([0.0, *clock, signaled]))
        self.flat.control[0] = loss
        self.flat.sum_()
        loss, seconds, stop, save, signaled, norm = torch.cat((self.flat.control, self.flat.norm()[None])).tolist()
        return StepResult(loss, seconds, stop > 0, save > 0, signaled > 0, norm)

    def quantization_aware(self, step: int) -> bool:
        """Whether the forward of the step that follows `step` completed ones is fake-quantized, judged by the clock of
        the step before: this one's reaches the other ranks with the gradients."""
        schedule = self.config.schedule
        multiplier = lr_multiplier(step, self.clock, schedule)
        return quantization_aware(budget_used(step, self.clock, schedule), multiplier, self.config.quant)

    def update(self, step: int, result: StepResult) -> float:
        """Clip, step all optimizers, average, return the learning-rate multiplier.

        Raises NonFiniteError, with parameters and optimizer state untouched, when the loss or a gradient is
        not finite; the message names the first such tensor.
        """
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise NonFiniteError(f"step {step}: {self._culprit(result)} is not finite; the update was not applied")
        limit = self.config.optim.grad_clip_norm
        if limit and result.grad_norm > limit:
            self.flat.gradients.mul_(limit / (result.grad_norm + 1e-6))
        multiplier = lr_multiplier(step, result.seconds, self.config.schedule)
        self.optimizers.step(multiplier, muon_momentum(step, self.config.optim))
        self.average.update(step + 1, multiplier)
        self.clock = result.seconds
        return multiplier

    def _culprit(self, result: StepResult) -> str:
        grads = to_upstream({name: p.grad for name, p in self.model.named_parameters()})
        # Sharded, a rank sees the sum of its own share only: whoever sees a bad one tells the others.
        flags = torch.stack([~torch.isfinite(grad).all() for grad in grads.values()]).float()
        flags = self.ranks.sum_(flags).tolist()
        bad = [name for name, flag in zip(grads, flags, strict=True) if flag]
        loss = "" if math.isfinite(result.loss) else f"the loss ({result.loss})"
        grad = f"the gradient of {bad[0]} ({len(bad)} of {len(grads)} tensors)" if bad else ""
        return " and ".join(filter(None, (loss, grad))) or f"the gradient norm ({result.grad_norm})"

    def check_finite(self) -> None:
        """Raises NonFiniteError naming a parameter that the last update made NaN or infinite."""
        for name, p in self.model.named_parameters():
            if not torch.isfinite(p).all():
                raise NonFiniteError(f"parameter {name} is not finite after the last update; nothing was exported")

    def warm_up(self, steps: int, tick: Callable[[int], None]) -> None:
        """Run `steps` full steps to compile everything, then undo them; `tick(i)` is called before step i."""
        model = {k: v.clone() for k, v in self.model.state_dict().items()}
        optimizers = {k: v.clone() for k, v in self.optimizers.state().items()}
        for step in range(steps):
            tick(step)
            self.accumulate(0)
            self.optimizers.step(1.0, self.config.optim.muon_momentum)
        if self.config.runtime.optimizer_graph:
            self.optimizers.capture()
        self.model.load_state_dict(model)
        self.optimizers.load_state(optimizers)


def compute_dtype(config: RunConfig, ranks: Ranks) -> torch.dtype:
    """The dtype of activations and matmuls; "auto" is bfloat16 where the matrix units speak it: on GPUs, and on
    CPUs with AMX (a 0.7 M parameter model trains 1.6 times as fast there as in float32).

    Raises InputError for bfloat16 on a GPU that lacks it.
    """
    choice, cuda = config.runtime.dtype, ranks.device.type == "cuda"
    if cuda and choice != "float32" and not torch.cuda.is_bf16_supported():
        raise InputError(f"{torch.cuda.get_device_name()} has no bfloat16; use --runtime.dtype float32")
    if choice == "auto":
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return ranks.share(torch.bfloat16 if cuda or amx else torch.float32)
    return getattr(torch, choice)
