"""Log probability of target tokens from hidden states:  log softmax(z)[target],  z = cap tanh(h Wᵀ / cap).

Shapes: hidden (..., D); head_weight (V, D), rounded to hidden's dtype; targets (...), int64; mask (...),
bool, True where a token is scored, None for everywhere. Result: (...), natural logarithm, exactly 0 where
masked; targets there are not looked at. softcap=None leaves z = h Wᵀ.

Precision: h Wᵀ is accumulated in fp32, and eager rounds it to hidden's dtype, where the kernel keeps it; softcap,
softmax and result are fp32 (float64 for float64 hidden).

Kernel (_softcap.py): no logits in memory, with gradients or without.

Memory of eager: rows are scored in chunks of 2^24 / V, so that the logits alive at a time are 64 MiB in fp32, 200 MiB
with temporaries, whatever the length of the input. That holds without gradients; with them autograd keeps
every chunk.

Backward, with p = softmax(z) and g the gradient of a token's log probability (masked: 0):
    dz = g (onehot(target) - p)      du = dz (1 - (z / cap)²), u = h Wᵀ      dh = du W      dW = duᵀ h

Targets outside the vocabulary are a ValueError on CPU; on CUDA torch's own device assertion stops eager, and the
kernel answers NaN.

Sources: Gemma 2, arXiv:2408.00118 (softcap).
"""

from __future__ import annotations

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
from ._softcap import backward_cost as token_logprobs_backward_cost  # noqa: F401
from ._softcap import softcap_logprobs

__all__ = ["token_logprobs", "token_logprobs_cost", "token_logprobs_ref"]

# Blocks above 32 MiB go back to the system when freed. Smaller chunks let results that stay alive fragment glibc's
# heap: 30,000 rows at V = 8192 grew the process by 970 MiB with 2^22 logits a chunk, by 203 MiB with 2^24, as fast.
_CHUNK_LOGITS = 1 << 24

_MASKED = torch.iinfo(torch.int64).min  # the target of a token that is not scored


def token_logprobs_ref(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 30.0,
    mask: Tensor | None = None,
) -> Tensor:
    z = F.linear(hidden, head_weight.to(hidden.dtype))
    z = z.to(accumulate_dtype(z.dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    targets = targets if mask is None else targets.where(mask, 0)
    logprobs = torch.log_softmax(z, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logprobs if mask is None else logprobs.where(mask, 0)


def token_logprobs_cost(tokens: int, dim: int, vocab_size: int, *, itemsize: int = 2) -> tuple[int, int]:
    """(flops, bytes) with logits on chip: hidden, weight and targets read once, fp32 result written."""
    return 2 * tokens * dim * vocab_size, itemsize * dim * (tokens + vocab_size) + 12 * tokens


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 30.0,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """hidden (..., D), head_weight (V, D), targets (...) -> fp32 log p(target) in nats, 0 where not mask."""
    check_floats("token_logprobs", hidden=hidden, head_weight=head_weight)
    check_linear("token_logprobs", hidden, head_weight, "hidden", "head_weight")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != targets.shape):
        raise ValueError(
            f"token_logprobs: mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; "
            f"possible: {tuple(targets.shape)}, as targets, and torch.bool"
        )
    check_targets("token_logprobs", hidden, head_weight, targets, mask)
    check_softcap("token_logprobs", softcap)
    hidden = autocast(hidden)
    if runs_triton("token_logprobs", impl, hidden, targets.numel()):
        scored = targets if mask is None else targets.where(mask, _MASKED)
        flat = hidden.reshape(targets.numel(), hidden.shape[-1]), head_weight, scored.flatten()
        logprobs, _, _ = softcap_logprobs(*flat, softcap, _MASKED)
        return logprobs.view(targets.shape)
    rows = max(1, _CHUNK_LOGITS // max(1, head_weight.shape[0]))
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    flat = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.flatten(), mask.flatten()
    chunks = zip(*(tensor.split(rows) for tensor in flat), strict=True)
    logprobs = [token_logprobs_ref(h, head_weight, t, softcap=softcap, mask=m) for h, t, m in chunks]
    return torch.cat(logprobs).view(targets.shape)
