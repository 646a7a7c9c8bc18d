"""Which backend scaled_dot_product_attention uses: of those that agree with math, the one that is fastest here.

On a GPU each is timed at the start of a run on the run's own shapes, because the order differs between chips, lengths
and versions; what was measured is kept in one file a question under $XDG_CACHE_HOME/golfgpt/attention. On a CPU, where
there is one fused kernel, the first that agrees is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from golfgpt_kernels.timing import time_us
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from golfgpt.config import ModelConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.train.machine_cache import kept_times

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""In the order in which "auto" takes them where nothing is timed; math only where nothing else works. At head_dim 64
and length 1024 the FlashAttention-3 paper measures cuDNN's causal forward ahead of FlashAttention-2 on an H100 (288
against 229 TFLOP/s). flash3 is the flash backend with FlashAttention-3's kernels, where flash_attn_interface can be
imported."""

Shape = tuple[int, int]
"""Sequences and tokens of a batch."""


@dataclass(frozen=True)
class Selection:
    """The backend that the process uses from now on, and why."""

    backend: str
    ms: dict[str, float]
    """What was timed, fastest first."""
    kept: bool
    """Whether the timing is that of an earlier run."""
    refused: dict[str, str]

    def __str__(self) -> str:
        timed = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.ms.items())
        notes = [*filter(None, [timed + " in an earlier run" * self.kept])]
        notes += [f"{name}: {why}" for name, why in self.refused.items()]
        return self.backend + (f" ({'; '.join(notes)})" if notes else "")


def select_backend(
    choice: str,
    config: ModelConfig,
    shapes: Sequence[Shape],
    ranks: Ranks,
    dtype: torch.dtype,
    *,
    backward: bool = True,
) -> Selection:
    """Enable one backend for the process, `choice` or with "auto" the best; rank 0's on all ranks.

    A candidate must run forward and backward on this model's heads at the lengths of all `shapes` and agree with the
    math backend (cuDNN's backward has returned NaN for some lengths). On a GPU the time is that of one attention on the
    first of `shapes`, with its `backward` or without. Math stays enabled behind the chosen one, for tensors on another
    device and explicit masks. Raises InputError when a named backend does not pass.
    """
    works, refused, device = [], {}, ranks.device
    possible = BACKENDS if device.type == "cuda" else ("flash", "math")
    for name in possible if choice == "auto" else (choice,):
        if name == "math" and works:
            break
        reasons = (_probe(name, config, length, device, dtype) for length in sorted({length for _, length in shapes}))
        if reason := next(filter(None, reasons), None):
            refused[name] = reason
            continue
        works.append(name)
        if device.type != "cuda":
            break
    ranks.raise_on_any_rank(None if works else InputError(f"runtime.attention {choice} does not work here: {refused}"))
    ms, kept = _measure(works, config, shapes[0], device, dtype, backward) if len(works) > 1 else ({}, False)
    best = min(works, key=ms.get) if ms else works[0]
    if (agreed := ranks.broadcast_object(best)) != best:
        return select_backend(agreed, config, shapes, replace(ranks, rank=0, world=1), dtype)
    torch.backends.cuda.enable_cudnn_sdp(best == "cudnn")
    torch.backends.cuda.enable_flash_sdp(best in ("flash", "flash3"))
    torch.backends.cuda.enable_mem_efficient_sdp(best == "efficient")
    torch.backends.cuda.enable_math_sdp(True)
    use_flash3(best == "flash3")
    torch.compiler.config.cache_key_tag = f"attention:{best}"  # its caches do not see which backend is enabled
    return Selection(best, ms, kept, refused)


def use_flash3(on: bool) -> None:
    """Put FlashAttention-3's kernels behind torch's flash backend, or torch's own back. Raises ImportError where
    they are not installed, or cannot be taken back in this torch."""
    restore = getattr(torch_attention, "restore_flash_attention_impl", None)
    if on and restore is None:
        raise ImportError(f"torch {torch.__version__} cannot switch FlashAttention-3 off again")
    if on:
        torch_attention.activate_flash_attention_impl("FA3")
    elif restore is not None and torch_attention.current_flash_attention_impl() is not None:
        restore()


@contextlib.contextmanager
def _only(name: str) -> Iterator[None]:
    use_flash3(name == "flash3")
    try:
        with sdpa_kernel(BACKENDS[name]):
            yield
    finally:
        use_flash3(False)


def _inputs(config: ModelConfig, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k, v and the output's gradient, (B, heads, T, head_dim) in the memory order in which the model makes them."""
    generator = torch.Generator(device).manual_seed(0)
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads
    sizes = [(*shape, count, config.head_dim) for count in heads]
    made = [torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2) for size in sizes]
    q, k, v = (t.requires_grad_() for t in made[:3])
    return {"q": q, "k": k, "v": v, "g": made[3]}


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _with_gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    out = _attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), g)]


def _without(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    with torch.no_grad():
        return _attend(q, k, v)


def _probe(name: str, config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the backend gives math's output and gradients on random input, else the reason."""
    if name == "math":
        return None
    inputs = _inputs(config, (1, length), device, dtype)
    with _only("math"):
        expected = _with_gradients(**inputs)
    try:
        with _only(name):
            ours = _with_gradients(**inputs)
    except (RuntimeError, ImportError, ValueError, AttributeError) as error:
        return str(error).split(". ")[0].splitlines()[0]
    for mine, reference in zip(ours, expected, strict=True):
        error = (mine.float() - reference.float()).norm() / reference.float().norm()
        if not error < 0.02:  # bf16 rounding gives 0.003; NaN fails too
            return f"differs from math by {error.item():.3g} relative"
    return None


def _measure(
    names: Sequence[str], config: ModelConfig, shape: Shape, device: torch.device, dtype: torch.dtype, backward: bool
) -> tuple[dict[str, float], bool]:
    """ms of one attention by backend, fastest first, and whether an earlier run measured them."""
    question = {
        "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
        "shape": shape,
        "dtype": str(dtype),
        "backward": backward,
        "backends": names,
    }

    def measure() -> dict[str, float]:
        inputs, ms = _inputs(config, shape, device, dtype), {}
        call = _with_gradients if backward else _without
        for name in names:
            with _only(name):
                ms[name] = time_us(lambda each: call(**each), [inputs], device).us / 1e3
        return ms

    return kept_times("attention", device, question, names, measure)
