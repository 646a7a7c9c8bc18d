"""Advice for a first step that does not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from golfgpt.config import ModelConfig, RunConfig
from golfgpt.errors import InputError


def activation_bytes(model: ModelConfig, tokens: int, itemsize: int) -> int:
    """Estimate of the bytes that a forward over `tokens` tokens keeps for its backward. Per token and layer, it counts
    14 values of width model_dim, keys and values, and two values of width mlp_hidden. The estimate is 1.05 to 1.08
    times the published peaks (8.5 to 18.9 GB)."""
    per_layer = 14 * model.model_dim + 2 * model.kv_dim + 2 * model.mlp_hidden
    return tokens * len(model.layer_order()) * per_layer * itemsize


@contextlib.contextmanager
def memory_advice(config: RunConfig, itemsize: int, *, first: bool = True) -> Iterator[None]:
    """If the block runs out of memory and is the first step (`first`), raise an InputError that says what to do. Sizes
    are never reduced automatically."""
    try:
        yield
    except Exception as error:
        if first and ran_out(error):
            raise out_of_memory(config, itemsize, error) from None
        raise


def ran_out(error: Exception) -> bool:
    """Whether it says that memory ran out. torch's CPU allocator raises RuntimeError."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def out_of_memory(config: RunConfig, itemsize: int, error: Exception) -> InputError:
    """The error for a first step that does not fit: about how much it needs, and how to take it in less memory."""
    data = config.data
    micro = data.microbatch
    need = activation_bytes(config.model, micro, itemsize)
    smaller = next(
        (n for n in (micro // 2, micro // 4, data.seq_len) if n and n % data.seq_len == 0 and n < micro), None
    )
    same = "reads other rows, in" if data.order == "packed" else "takes the same steps in"
    advice = (
        f"--data.microbatch-tokens {smaller} {same} about "
        f"{activation_bytes(config.model, smaller, itemsize) / 2**30:.1f} GiB"
        if smaller
        else "one sequence is the minimum: lower --data.seq-len or choose a smaller model"
    )
    reason = str(error).splitlines()[0][:200]
    return InputError(
        f"out of memory in the first step: forward and backward of {micro:,} tokens need about {need / 2**30:.1f} GiB "
        f"in addition to weights and optimizer; {advice} ({reason})"
    )
