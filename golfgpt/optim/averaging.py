"""Averages of the weights over training. The average is exported instead of the last weights.

    swa   mean of the weights after every swa_every-th step, counting only steps with a learning-rate multiplier below
          swa_start_lr (Izmailov et al., arXiv:1803.05407; the start depends on the learning rate, as in the published
          recipes)
    ema   m <- d m + (1 - d) w after every step; the mean is m / (1 - d^n), which removes the bias toward the zero
          start, as in Adam

Sums are float32 on the device of the parameters. An update is a few fused launches without a synchronization. The
published scripts sum in the dtype of each parameter (average.sums="parameter"). For bfloat16 embeddings, that makes an
error of about 2 % after 48 sums (measured in tests/test_quant_aware.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from golfgpt.config import AverageConfig


class Average:
    """The running average of named parameters."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: AverageConfig, bf16_params: frozenset[str] = frozenset()
    ):
        """`bf16_params`: names of the parameters with bfloat16 values, for average.sums="parameter"."""
        self.config = config
        self._parameters = dict(parameters) if config.kind != "none" else {}
        self._bf16_params = bf16_params if config.sums == "parameter" else frozenset()
        self._sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._parameters.items()}
        device = next((p.device for p in self._parameters.values()), None)
        self._count = torch.zeros((), device=device)

    @torch.no_grad()
    def begin(self) -> None:
        """Called before the first step, with the initial weights."""
        if self.config.ema_start == "initial":
            torch._foreach_copy_(list(self._sums.values()), [p.detach() for p in self._parameters.values()])

    @property
    def count(self) -> int:
        """Number of steps in the average. Waits for the device."""
        return int(self._count)

    @torch.no_grad()
    def update(self, step: int, multiplier: float, ok: Tensor | float = 1.0) -> None:
        """Add the weights after `step` completed steps if they belong to the average. `multiplier` is the learning-rate
        multiplier of the last step. If `ok`, a 0-d bool tensor on the device, is false, that step changed no weights,
        and nothing is added."""
        c = self.config
        if c.kind == "none" or (c.kind == "swa" and not (multiplier < c.swa_start_lr and step % c.swa_every == 0)):
            return
        sums, weights = list(self._sums.values()), [p.detach() for p in self._parameters.values()]
        taken = self._count.new_ones(()) * ok
        self._count += taken
        if c.kind == "ema":  # computed as m + (1 - d) (w - m), which is exact for weights that do not change
            change = torch._foreach_sub(weights, sums)
            torch._foreach_mul_(change, taken * (1 - c.ema_decay))
            torch._foreach_add_(sums, change)
        else:
            torch._foreach_add_(sums, torch._foreach_mul(weights, taken))
            for name in self._bf16_params & self._sums.keys():
                self._sums[name].copy_(self._sums[name].bfloat16())

    @property
    def ready(self) -> bool:
        """Whether there is enough to average: two samples for swa, as published, or one for ema."""
        return self.count >= (2 if self.config.kind == "swa" else 1)

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters; empty if the average is not ready."""
        if not self.ready:
            return {}
        started = self.config.ema_start == "initial"
        total = self.count if self.config.kind == "swa" else 1 - (not started) * self.config.ema_decay**self.count
        means = {name: value / total for name, value in self._sums.items()}
        return means | {name: means[name].bfloat16().float() for name in self._bf16_params & means.keys()}

    def state(self) -> dict[str, Tensor]:
        """Count and sums by name, for a checkpoint; empty without averaging."""
        return {"count": self._count, **self._sums} if self._parameters else {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`. The empty state of an imported model resets the average."""
        for name, value in {"count": self._count, **self._sums}.items():
            value.copy_(tensors[name]) if tensors else value.zero_()
