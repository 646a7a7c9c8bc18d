"""The dtype of activations and matmuls: bfloat16 on a GPU, and on a CPU bfloat16 or float32, whichever is faster there.

bfloat16 has taken 0.6 of float32's time on a CPU with AVX-512 BF16, and 9 times as long on one with AVX2, where a
matmul of Newton-Schulz runs at 1 GFLOP/s instead of 64 (LOG.md). So "auto" times both on the run's own model and keeps
the times. The choice holds for the optimizer's matmuls too.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from golfgpt.config import DataConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.model.gpt import GPT
from golfgpt.quant.compute_copies import ComputeCopies
from golfgpt.train.machine_cache import kept_times

SECONDS = 0.5
"""How long to measure. A CPU that needs longer for 16 tokens is slow in bfloat16, or so busy that times mean nothing: a
`demo` beside two other jobs measured 5,502 us a token in bfloat16 and 17,367 in float32, 3 and 27 times the usual."""
ROUNDS = 3
CANDIDATES = ("bfloat16", "float32")
"""In the order of timing."""
CLEARLY = 0.9
"""bfloat16 must take less than this part of float32's time to be worth its rounding."""


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype of a run, and why."""

    dtype: torch.dtype
    why: str = ""

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def select_dtype(choice: str, model: GPT, data: DataConfig, ranks: Ranks) -> DtypeChoice:
    """`choice`, or with "auto" the best for `model` on microbatches of `data`; the same on all ranks.

    On a CPU all ranks measure at once, because they share its cores in training too, and rank 0's times count. Raises
    InputError for bfloat16 on a GPU that lacks it.
    """
    cuda = ranks.device.type == "cuda"
    if cuda and choice != "float32" and not torch.cuda.is_bf16_supported():
        raise InputError(f"{torch.cuda.get_device_name()} has no bfloat16; use --runtime.dtype float32")
    if choice != "auto" or cuda:
        return DtypeChoice(torch.bfloat16 if choice == "auto" else getattr(torch, choice))
    facts = {
        "model": asdict(model.config),
        "tokens": data.microbatch,
        "seq_len": data.seq_len,
        "threads": torch.get_num_threads(),
        "world": ranks.world,
    }
    measured = None
    with ranks.raise_on_any():  # a signal may reach one rank while it measures
        measured = kept_times("dtype", ranks.device, facts, CANDIDATES, lambda: _measure(model, data))
    us, kept = ranks.broadcast_object(measured)
    if not us:
        return DtypeChoice(torch.float32, f"no measurement within {SECONDS:g} s: the CPU is slow or busy")
    best = "bfloat16" if us["bfloat16"] < CLEARLY * us["float32"] else "float32"
    ratio = us["bfloat16"] / us["float32"]
    when = "in an earlier run" if kept else "now"
    return DtypeChoice(getattr(torch, best), f"bfloat16 takes {ratio:.2f} times as long as float32, measured {when}")


def _measure(model: GPT, data: DataConfig) -> dict[str, float]:
    """Microseconds per token of forward and backward by dtype, the least of ROUNDS taken in turn.

    On 16 tokens first, then on 4 times as many while SECONDS last, up to a microbatch. Empty if 16 take longer.
    """
    size, used, us = min(16, data.microbatch), 0.0, {}
    while True:
        shape = (max(size // data.seq_len, 1), min(size, data.seq_len))
        ids = torch.arange(shape[0] * shape[1]).remainder(model.config.vocab_size).view(shape)
        best = dict.fromkeys(CANDIDATES, float("inf"))
        for name in CANDIDATES * ROUNDS:
            seconds = _seconds(model, ids, getattr(torch, name))
            best[name], used = min(best[name], seconds), used + seconds
            if used > SECONDS:
                return us
        us = {name: 1e6 * seconds / ids.numel() for name, seconds in best.items()}
        if size == data.microbatch or used + 4 * ROUNDS * sum(best.values()) > SECONDS:
            return us
        size = min(4 * size, data.microbatch)


def _seconds(model: GPT, ids: Tensor, dtype: torch.dtype) -> float:
    """Of one forward and backward on `ids` (B, T), not compiled, with the matrices in `dtype` as in training."""
    copies = ComputeCopies(model, {}, dtype)
    copies.refresh()
    begun = time.perf_counter()
    loss = model.loss(ids, ids, dtype=dtype, stand_ins=copies.stand_ins())
    torch.autograd.grad(loss, copies.leaves)
    return time.perf_counter() - begun
