"""Which implementation of an op runs, and the input checks that ops share.

`impl` is "auto", "eager" or "triton", the last keyword of every op. "auto" is "eager" in this version. A
named implementation runs or raises its reason; it never falls back.

Checks of dtype, shape and device always run. Checks of values (NaN, targets outside the vocabulary) would
cost a host synchronization on a GPU and a graph break under torch.compile: they run for CPU tensors in
eager mode only.
"""

from typing import Literal

import torch
from torch import Tensor

from ._jit import triton_missing

Impl = Literal["auto", "triton", "eager"]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_impl(op: str, impl: str, device: torch.device) -> None:
    """Returns if the eager reference is to run, else raises why `impl` cannot."""
    if impl in ("auto", "eager"):
        return
    if impl != "triton":
        raise ValueError(f"{op}: impl={impl!r}; possible: 'auto', 'triton', 'eager'")
    reasons = [triton_missing()]
    if device.type != "cuda":
        reasons.append("no CUDA device" if not torch.cuda.is_available() else f"tensors are on {device}, not on CUDA")
    reasons.append(f"this version ships no Triton kernel for {op}")
    raise RuntimeError(f"{op}: impl='triton' cannot run: {'; '.join(filter(None, reasons))}; impl='eager' can")


def check_floats(op: str, **tensors: Tensor) -> None:
    """Each is a matrix operand of a dtype that ops compute in, and all are on one device."""
    device = None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; possible: {FLOAT_DTYPES}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the tensor before it on {device}; use one device")
        device = tensor.device


def check_linear(op: str, x: Tensor, w: Tensor, x_name: str = "x", w_name: str = "w") -> None:
    """x (..., K) against w (N, K)."""
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"{op}: {x_name} has shape {tuple(x.shape)} and {w_name} {tuple(w.shape)}; possible: (..., K) and (N, K)"
        )


def check_targets(op: str, hidden: Tensor, head_weight: Tensor, targets: Tensor, kept: Tensor | None) -> None:
    """targets: int64, one per row of hidden; those in `kept` (bool, None = all) lie in the vocabulary."""
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets have dtype {targets.dtype}; possible: torch.int64")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: targets have shape {tuple(targets.shape)}, hidden {tuple(hidden.shape)}; "
            f"possible: targets of shape {tuple(hidden.shape[:-1])}"
        )
    if targets.device != hidden.device:
        raise ValueError(f"{op}: targets are on {targets.device}, hidden on {hidden.device}; use one device")
    if values_readable(targets):
        vocab_size = head_weight.shape[0]
        outside = (targets < 0) | (targets >= vocab_size)
        outside = outside if kept is None else outside & kept
        if outside.any():
            index = tuple(outside.nonzero()[0].tolist())
            raise ValueError(
                f"{op}: targets[{', '.join(map(str, index))}] = {targets[index].item()}, "
                f"outside the vocabulary; possible: 0 to {vocab_size - 1}"
            )


def check_softcap(op: str, softcap: float | None) -> None:
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap={softcap}; possible: a positive number, or None for no cap")


def values_readable(tensor: Tensor) -> bool:
    """Reading values costs nothing here: no GPU to wait for, no graph to break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64 input, so that each reference is its own float64 oracle."""
    return torch.promote_types(dtype, torch.float32)
