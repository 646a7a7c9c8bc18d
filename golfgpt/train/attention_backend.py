"""Which backend scaled_dot_product_attention uses: the fastest here of those that agree with the math backend.

On a GPU each one is timed at the start of a run on the run's own shapes, because the order differs between chips,
lengths and versions. The times are kept under $XDG_CACHE_HOME/golfgpt/attention. A CPU has one fused kernel, so there
the first backend that agrees is taken.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from golfgpt_kernels.timing import time_us
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from golfgpt.config import ModelConfig, from_dict
from golfgpt.data.orders import boundaries
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.model.segments import Segments, attend_within
from golfgpt.train.children import settled, verdicts
from golfgpt.train.machine_cache import kept_times, kept_value

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""In the order in which "auto" tries them; math is the last resort. flash3 is the flash backend with the kernels of
FlashAttention-3, if flash_attn_interface can be imported."""

PROBE_SECONDS = 120.0
"""For all probes at once, of which most is the import of torch."""

MAX_ERROR = 0.02
"""Relative difference from math that a backend may have: rounding to bfloat16 gives 0.003."""


class Shape(NamedTuple):
    """Of a batch that attends."""

    sequences: int
    tokens: int
    longest: int = 0
    """Tokens of a segment, if it is a packed row; 0: all tokens of a sequence attend to each other."""

    @property
    def probed(self) -> Shape:
        """A batch of fewer tokens with the same kernels."""
        return Shape(1, min(self.tokens, 4 * self.longest) if self.longest else self.tokens, self.longest)


@dataclass(frozen=True)
class Selection:
    """The chosen backend, and why."""

    backend: str
    ms: dict[str, float]
    """The times, fastest first."""
    kept: bool
    """Whether an earlier run measured them."""
    refused: dict[str, str]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.ms.items())
        if self.kept:
            times += " in an earlier run"
        notes = [f"{name}: {why}" for name, why in self.refused.items()]
        if times:
            notes.insert(0, times)
        return f"{self.backend} ({'; '.join(notes)})" if notes else self.backend


def select_backend(
    choice: str,
    config: ModelConfig,
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
    dtype: torch.dtype,
    *,
    backward: bool = True,
    enable: bool = True,
) -> Selection:
    """Choose the backend `choice`, or the best one if it is "auto", and enable it for the process. `shapes` are as
    `Shape`. All ranks take rank 0's. On a GPU "auto" tries the backends in child processes first, where one may crash.

    A backend must run forward and backward on this model's heads at the lengths of all `shapes` and agree with math
    (cuDNN's backward has returned NaN for some lengths). On a GPU one attention on the first of `shapes` is timed, with
    or without its `backward`. Math stays enabled too, for tensors on another device and for explicit masks. Raises
    InputError if no candidate passes.
    """
    device, shapes = ranks.device, [Shape(*shape) for shape in shapes]
    probed = sorted({shape.probed for shape in shapes})
    gpu = device.type == "cuda"
    names = (choice,) if choice != "auto" else tuple(BACKENDS) if gpu else ("flash", "math")
    if choice == "auto" and gpu:
        found = ranks.broadcast_object(_probe_in_children(config, probed, device, dtype) if ranks.is_main else None)
    else:
        found = {name: probe(name, config, probed, device, dtype) for name in names}
    refused = {name: why for name, why in found.items() if why}
    works = [name for name in names if name not in refused]
    works = [name for name in works if name != "math"] or works  # math is the last resort
    ranks.raise_on_any_rank(None if works else InputError(f"runtime.attention {choice} does not work here: {refused}"))
    ms, kept = _measure(works, config, shapes[0], device, dtype, backward) if gpu and len(works) > 1 else ({}, False)
    ms, kept = ranks.broadcast_object((ms, kept))
    best = ranks.broadcast_object(min(works, key=ms.get) if ms else works[0])
    if not ranks.is_main and (why := probe(best, config, probed, device, dtype)):
        raise InputError(f"runtime.attention {best}, which rank 0 chose, does not work on rank {ranks.rank}: {why}")
    if enable:
        enable_backend(best)
    return Selection(best, ms, kept, refused)


def enable_backend(name: str) -> None:
    """scaled_dot_product_attention uses this backend from now on, and math where the backend cannot."""
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_flash_sdp(name in ("flash", "flash3"))
    torch.backends.cuda.enable_mem_efficient_sdp(name == "efficient")
    torch.backends.cuda.enable_math_sdp(True)
    use_flash3(name == "flash3")
    torch.compiler.config.cache_key_tag = f"attention:{name}"  # torch's caches do not see which backend is enabled


def use_flash3(on: bool) -> None:
    """Make torch's flash backend use FlashAttention-3's kernels, or torch's own again. Raises ImportError if they are
    not installed, or if this torch cannot switch back."""
    restore = getattr(torch_attention, "restore_flash_attention_impl", None)
    if on and restore is None:
        raise ImportError(f"torch {torch.__version__} cannot switch FlashAttention-3 off again")
    if on:
        torch_attention.activate_flash_attention_impl("FA3")
    elif restore is not None and torch_attention.current_flash_attention_impl() is not None:
        restore()


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """Attention uses this backend and no other."""
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
    sizes = [(shape.sequences, shape.tokens, count, config.head_dim) for count in heads]
    made = [torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2) for size in sizes]
    q, k, v = (t.requires_grad_() for t in made[:3])
    return {"q": q, "k": k, "v": v, "g": made[3]}


def _attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor, longest: int = 0, backward: bool = True) -> list[Tensor]:
    """The output, and with `backward` the gradients of q, k and v."""
    with torch.set_grad_enabled(backward):
        if longest:
            # Documents of two thirds of the longest, and boundaries as a loader gives them.
            tokens = np.arange(q.size(2)) % (longest * 2 // 3 + 1)
            ends = torch.from_numpy(boundaries(tokens, 0, longest)).to(q.device)
            out = attend_within(q, k, v, Segments.of(ends, q.size(2), longest, q.dtype))
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    gradients = torch.autograd.grad(out, (q, k, v), g) if backward else ()
    return [out.detach(), *gradients]


def probe(
    name: str, config: ModelConfig, shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why the backend cannot be used; None if its output and gradients on random input of each shape agree with
    math."""
    return next(filter(None, (_probe(name, config, Shape(*shape), device, dtype) for shape in shapes)), None)


def _probe_in_children(
    config: ModelConfig, shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype
) -> dict[str, str | None]:
    """`probe` of all backends, in a child process each, since a backend may crash or hang; kept for the next run."""
    facts = {"model": asdict(config), "shapes": list(shapes), "device": str(device), "dtype": str(dtype)}
    command = [sys.executable, "-m", "golfgpt.train.attention_backend", json.dumps(facts)]

    def make() -> dict[str, str | None]:
        tried = [name for name in BACKENDS if name != "math"]
        return verdicts({name: [*command, name] for name in tried}, PROBE_SECONDS) | {"math": None}

    def keep(found: dict[str, str | None]) -> bool:
        return all(map(settled, found.values()))

    return kept_value("attention", device, facts, lambda found: {name: found[name] for name in BACKENDS}, make, keep)[0]


def _probe(name: str, config: ModelConfig, shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "math":
        return None
    inputs = _inputs(config, shape, device, dtype) | {"longest": shape.longest}
    with only("math"):
        expected = _attend(**inputs)
    try:
        with only(name):
            ours = _attend(**inputs)
    except (RuntimeError, ImportError, ValueError, AttributeError) as error:
        return str(error).split(". ")[0].splitlines()[0]
    for mine, reference in zip(ours, expected, strict=True):
        error = (mine.float() - reference.float()).norm() / reference.float().norm()
        if not error < MAX_ERROR:  # NaN fails too
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
        for name in names:
            with only(name):
                work = partial(_attend, longest=shape.longest, backward=backward)
                ms[name] = time_us(lambda each, work=work: work(**each), [inputs], device).us / 1e3
        return ms

    return kept_times("attention", device, question, names, measure)


if __name__ == "__main__":
    facts, name = json.loads(sys.argv[1]), sys.argv[2]
    model, dtype = from_dict(ModelConfig, facts["model"]), getattr(torch, facts["dtype"].removeprefix("torch."))
    print(json.dumps({name: probe(name, model, facts["shapes"], torch.device(facts["device"]), dtype)}))
