"""All gradients in one buffer, summed over ranks with few collectives. Matrices are grouped so that they can be
sharded.

Layout: stacks of matrices of equal shape (one bank after another), then all other parameters, then a few control
numbers that are summed together with the gradients.

Replicated: one all-reduce, and every rank updates every matrix. Sharded (ZeRO stage 1, Rajbhandari et al.,
arXiv:1910.02054): stacks are padded with zero matrices to a multiple of the number of ranks. A reduce-scatter gives
each rank the summed gradients of its shard of every stack. The rank updates these matrices, and an all-gather
distributes the new weights, which are also in one buffer. Reduce-scatter and all-gather together move as many bytes as
an all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.model.parameters import of_kind


@dataclass(frozen=True)
class Stack:
    """Banks of matrices of equal shape, one after another, padded. If it is sharded, this rank updates only `shard`."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    """Number of matrices in each bank."""
    gradients: Tensor
    """(padded, rows, cols), float32."""
    weights: Tensor | None
    """The weights in the same layout, and the storage of the parameters; None if nothing is sharded."""
    shard: nn.Parameter | None
    """The matrices of this rank (padded / ranks, rows, cols), with their summed gradients."""


class FlatGradients:
    """The gradients of a model and their sum over ranks. `control` is the number of control numbers; `matrices` names
    what may be sharded (None: every matrix)."""

    def __init__(self, model: GPT, ranks: Ranks, *, sharded: bool, control: int, matrices: Sequence[str] | None = None):
        self.ranks, self.sharded = ranks, sharded and ranks.world > 1
        self._parts = ranks.world if self.sharded else 1
        named = dict(model.named_parameters())
        self._parameters = list(named.values())
        groups: dict[tuple[int, ...], list[str]] = {}
        matrices = of_kind(model.table, "matrix") if matrices is None else matrices
        for name in matrices:
            groups.setdefault(tuple(named[name].shape[-2:]), []).append(name)
        padded = {shape: self._pad(shape, [named[n] for n in names]) for shape, names in groups.items()}
        rest = [name for name in named if name not in matrices]
        sizes = [count * math.prod(shape) for shape, count in padded.items()]
        self._all = torch.zeros(sum(sizes) + sum(named[n].numel() for n in rest) + control, device=ranks.device)
        *regions, self._tail = self._all.split([*sizes, self._all.numel() - sum(sizes)])
        self.stacks = [
            self._stack(named, names, region.view(-1, *shape))
            for (shape, names), region in zip(groups.items(), regions, strict=True)
        ]
        *views, self.control = self._tail.split([*(named[n].numel() for n in rest), control])
        for name, view in zip(rest, views, strict=True):
            named[name].grad = view.view_as(named[name])
        self.gradients = self._all[: self._all.numel() - control]

    def _pad(self, shape: tuple[int, ...], banks: list[Tensor]) -> int:
        count = sum(bank.numel() for bank in banks) // math.prod(shape)
        return math.ceil(count / self._parts) * self._parts

    def _stack(self, named: dict[str, nn.Parameter], names: list[str], gradients: Tensor) -> Stack:
        counts = [named[name].numel() // gradients[0].numel() for name in names]
        weights = shard = None
        for name, grad in zip(names, gradients[: sum(counts)].split(counts), strict=True):
            named[name].grad = grad.view_as(named[name])
        if self.sharded:
            weights = torch.zeros_like(gradients)
            for name, weight in zip(names, weights[: sum(counts)].split(counts), strict=True):
                named[name].data = weight.view_as(named[name]).copy_(named[name].data)
            shard = nn.Parameter(self.ranks.own(weights))
            shard.grad = self.ranks.own(gradients)
        return Stack(tuple(names), tuple(counts), gradients, weights, shard)

    @torch.no_grad()
    def accumulate_(self, gradients: Sequence[Tensor], first: bool) -> None:
        """Add the gradients of a microbatch, one for each of `model.parameters()` and in any dtype; if it is the first
        of the step, replace those of the step before."""
        views = [p.grad for p in self._parameters]
        if first:
            torch._foreach_copy_(views, list(gradients))
        else:
            torch._foreach_add_(views, [g.to(view.dtype) for g, view in zip(gradients, views, strict=True)])

    def clip_(self, limit: float, scale: float = 1.0) -> None:
        """Clip what this rank has accumulated: its norm, times `scale`, to `limit`."""
        norm = torch.linalg.vector_norm(self.gradients) * scale
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        self.gradients.mul_(torch.where(norm.isfinite(), factor, 1.0))  # else it would hide what is not finite

    def sum_(self) -> None:
        """Sum the buffer over ranks. If it is sharded, each rank gets the sum of its shard of every stack and of all
        other parameters."""
        if not self.sharded:
            self.ranks.sum_(self._all)
            return
        self.ranks.reduce_scatter_([stack.gradients for stack in self.stacks])
        self.ranks.sum_(self._tail)

    def norm(self) -> Tensor:
        """Global norm of the summed gradients, 0-d, the same on every rank."""
        if not self.sharded:
            return torch.linalg.vector_norm(self.gradients)
        own = torch.stack([torch.linalg.vector_norm(stack.shard.grad) for stack in self.stacks]).square().sum()
        rest = torch.linalg.vector_norm(self._tail[: self._tail.numel() - self.control.numel()]).square()
        return (self.ranks.sum_(own) + rest).sqrt()

    def gather_weights(self) -> None:
        """Send the updated matrices of this rank to all ranks."""
        if self.sharded:
            self.ranks.all_gather_([stack.weights for stack in self.stacks])

    def gather(self, stack: Stack, shard: Tensor) -> dict[str, Tensor]:
        """Gather a tensor that every rank has for its shard of the stack, such as momentum. Returns bank name -> tensor
        (count, ...)."""
        whole = self.ranks.all_gather(shard)[: sum(stack.counts)]
        return dict(zip(stack.names, whole.split(stack.counts), strict=True))

    def scatter(self, stack: Stack, banks: dict[str, Tensor]) -> Tensor:
        """Inverse of `gather`: the shard of this rank. Padding is zero."""
        parts = [
            banks[name].reshape(count, *banks[name].shape[-2:])
            for name, count in zip(stack.names, stack.counts, strict=True)
        ]
        whole = torch.cat(parts)
        missing = len(stack.gradients) - len(whole)
        return self.ranks.own(torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])).clone()
