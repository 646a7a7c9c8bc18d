"""Which backend scaled_dot_product_attention uses: the first that runs here and agrees with math."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from golfgpt.config import ModelConfig
from golfgpt.errors import InputError

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""In the order in which "auto" tries them. At head_dim 64 and length 1024 the FlashAttention-3 paper measures
cuDNN's causal forward ahead of FlashAttention-2 on an H100 (288 against 229 TFLOP/s)."""


def select_backend(
    choice: str, config: ModelConfig, lengths: Iterable[int], device: torch.device, dtype: torch.dtype
) -> tuple[str, dict[str, str]]:
    """Enable one backend for the process; returns its name and why each one before it was passed over.

    A candidate must run forward and backward on this model's heads at all `lengths` and agree with the math
    backend (cuDNN's backward has returned NaN for some lengths). Math stays enabled behind the chosen one,
    for tensors on another device. Raises InputError when a named backend does not pass.
    """
    lengths = sorted(set(lengths))
    refused: dict[str, str] = {}
    for name in BACKENDS if choice == "auto" else (choice,):
        reasons = (_probe(name, config, length, device, dtype) for length in lengths)
        reason = next(filter(None, reasons), None)
        if reason is None:
            torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
            torch.backends.cuda.enable_flash_sdp(name == "flash")
            torch.backends.cuda.enable_mem_efficient_sdp(name == "efficient")
            torch.backends.cuda.enable_math_sdp(True)
            return name, refused
        refused[name] = reason
    raise InputError(f"runtime.attention {choice} does not work here: {refused}")


def _probe(name: str, config: ModelConfig, seq_len: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the backend gives math's output and gradients on random input, else the reason."""
    if name == "math":
        return None
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, seq_len, config.head_dim) for heads in (config.num_heads, config.num_kv_heads) for _ in "ab"]
    q, k, v, g = (torch.randn(s, generator=generator).to(device, dtype) for s in (shapes[0], *shapes[2:], shapes[0]))

    def run(backend: SDPBackend) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, g)]

    try:
        ours = run(BACKENDS[name])
    except RuntimeError as error:
        return str(error).split(". ")[0].splitlines()[0]
    for mine, reference in zip(ours, run(SDPBackend.MATH), strict=True):
        error = (mine.float() - reference.float()).norm() / reference.float().norm()
        if not error < 0.02:  # bf16 rounding gives 0.003; NaN fails too
            return f"differs from math by {error.item():.3g} relative"
    return None
