"""Softcapped cross entropy from hidden states:  loss = -log softmax(z)[target],  z = cap tanh(h Wᵀ / cap).

Shapes: hidden (..., D); head_weight (V, D), rounded to hidden's dtype; targets (...), int64. Loss: a
scalar for reduction "mean" (over targets that are not ignore_index; NaN if there is none, as in torch)
and "sum", (...) for "none". Natural logarithm. softcap=None leaves z = h Wᵀ. z_loss adds z_loss · lse²
per token, lse = log Σ exp z.

Precision: h Wᵀ is accumulated in fp32, and eager rounds it to hidden's dtype, where the kernel keeps it; softcap,
softmax and loss are fp32 (float64 for float64 hidden). dW is summed in fp32; the kernel rounds it once, to
head_weight's dtype, where eager rounds it to hidden's first. So a tied fp32 embedding, given as it is and not cast,
gets both its gradients in fp32.

Memory: eager holds the logits, tokens × V, in hidden's dtype and in fp32. The kernel (_softcap.py) holds none in the
forward, and in the backward a chunk of 128 MiB of their gradient, in hidden's dtype.

Backward, with p = softmax(z) and g the gradient of a token's loss (mean: 1 / count; ignored: 0):
    dz = g (p - onehot(target) + 2 z_loss lse p)      du = dz (1 - (z / cap)²), u = h Wᵀ
    dh = du W                                         dW = duᵀ h

Targets outside the vocabulary are a ValueError on CPU; on CUDA torch's own device assertion stops eager, and the
kernel answers NaN.

Sources: Gemma 2, arXiv:2408.00118 (softcap); PaLM, arXiv:2204.02311 (z-loss).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import (
    Impl,
    accumulate_dtype,
    autocast,
    check_floats,
    check_linear,
    check_softcap,
    check_targets,
    runs_triton,
)
from ._softcap import backward_cost as softcap_cross_entropy_backward_cost  # noqa: F401
from ._softcap import softcap_logprobs

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
        loss = loss + z_loss * torch.logsumexp(z, dim=-1).square().masked_fill(flat == ignore_index, 0)
    return _reduce(loss, targets, ignore_index, reduction)


def _reduce(loss: Tensor, targets: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != ignore_index).sum()


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
    check_floats(op, hidden=hidden, head_weight=head_weight)
    check_linear(op, hidden, head_weight, "hidden", "head_weight")
    check_targets(op, hidden, head_weight, targets, targets != ignore_index)
    check_softcap(op, softcap)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction={reduction!r}; possible: 'mean', 'sum', 'none'")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss={z_loss}; possible: a finite number >= 0")
    hidden = autocast(hidden)
    if runs_triton(op, impl, hidden, targets.numel()):
        flat = hidden.reshape(targets.numel(), hidden.shape[-1]), head_weight, targets.flatten()
        logprobs, lse, _ = softcap_logprobs(*flat, softcap, ignore_index)
        loss = z_loss * lse.square() - logprobs if z_loss else -logprobs
        return _reduce(loss, targets, ignore_index, reduction)
    return softcap_cross_entropy_ref(
        hidden,
        head_weight,
        targets,
        softcap=softcap,
        reduction=reduction,
        ignore_index=ignore_index,
        z_loss=z_loss,
    )
