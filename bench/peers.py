"""Two libraries that compute the softcapped loss without all of the logits in memory, called as a user would.

They are timed on a GPU, in the column "eager", where they are installed (extra "bench"). Both get the
weight in hidden's dtype, as their kernels want it; its fp32 gradient is a cast of theirs.
- cut-cross-entropy (Apple, arXiv:2411.09009) adds gradients under locks, so in no fixed order, and by default skips
  blocks of gradients that bf16 would hardly show (filter_eps).
- liger-kernel takes rows in chunks of logits, and computes the gradients in the forward already, if they are wanted.
"""

from __future__ import annotations

from torch import Tensor

SOFTCAP = 30.0


def cut_cross_entropy(h: Tensor, w: Tensor, targets: Tensor, impl: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, w.to(h.dtype), targets, softcap=SOFTCAP)


def liger_kernel(h: Tensor, w: Tensor, targets: Tensor, impl: str) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(softcap=SOFTCAP)(w.to(h.dtype), h, targets)


PEERS = {"cut_cross_entropy": cut_cross_entropy, "liger_kernel": liger_kernel}  # by module
