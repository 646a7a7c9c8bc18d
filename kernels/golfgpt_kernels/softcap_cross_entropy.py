"""Softcapped cross entropy from hidden states:  loss = -log softmax(z)[target],  z = cap tanh(h Wᵀ / cap).

Shapes: hidden (..., D); head_weight (V, D), rounded to hidden's dtype; targets (...), int64. Loss: a
scalar for reduction "mean" (over targets that are not ignore_index; NaN if there is none, as in torch)
and "sum", (...) for "none". Natural logarithm. softcap=None leaves z = h Wᵀ. z_loss adds z_loss · lse²
per token, lse = log Σ exp z.

Precision: h Wᵀ is accumulated in fp32 and rounded to hidden's dtype; softcap, softmax and loss are fp32
(float64 for float64 hidden). The eager reference holds the logits in memory: tokens × V in hidden's dtype
and in fp32.

Backward, with p = softmax(z) and g the gradient of a token's loss (mean: 1 / count; ignored: 0):
    dz = g (p - onehot(target) + 2 z_loss lse p)      du = dz (1 - (z / cap)²), u = h Wᵀ
    dh = du W                                         dW = duᵀ h

Targets outside the vocabulary are a ValueError on CPU; on CUDA torch's own device assertion stops them.

Sources: Gemma 2, arXiv:2408.00118 (softcap); PaLM, arXiv:2204.02311 (z-loss).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import (
    Impl,
    accumulate_dtype,
    check_floats,
    check_impl,
    check_linear,
    check_softcap,
    check_targets,
)

__all__ = ["softcap_cross_entropy", "softcap_cross_entropy_cost", "softcap_cross_entropy_ref"]

Reduction = Literal["mean", "sum", "none"]


def softcap_cross_entropy_ref(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 30.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    z = F.linear(hidden, head_weight.to(hidden.dtype))
    z = z.to(accumulate_dtype(z.dtype)).reshape(targets.numel(), head_weight.shape[0])
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    flat = targets.flatten()
    loss = F.cross_entropy(z, flat, ignore_index=ignore_index, reduction="none")
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, dim=-1).square() * (flat != ignore_index)
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (flat != ignore_index).sum()


def softcap_cross_entropy_cost(tokens: int, dim: int, vocab_size: int, *, itemsize: int = 2) -> tuple[int, int]:
    """(flops, bytes) of a forward with logits on chip: operands read once, fp32 loss written."""
    return 2 * tokens * dim * vocab_size, itemsize * dim * (tokens + vocab_size) + 12 * tokens


def softcap_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 30.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """hidden (..., D), head_weight (V, D), targets (...) -> fp32 loss in nats."""
    op = "softcap_cross_entropy"
    check_impl(op, impl, hidden.device)
    check_floats(op, hidden=hidden, head_weight=head_weight)
    check_linear(op, hidden, head_weight, "hidden", "head_weight")
    check_targets(op, hidden, head_weight, targets, targets != ignore_index)
    check_softcap(op, softcap)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction={reduction!r}; possible: 'mean', 'sum', 'none'")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss={z_loss}; possible: a finite number >= 0")
    return softcap_cross_entropy_ref(
        hidden,
        head_weight,
        targets,
        softcap=softcap,
        reduction=reduction,
        ignore_index=ignore_index,
        z_loss=z_loss,
    )
