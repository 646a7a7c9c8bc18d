"""Which implementation of an op runs, and the input checks that ops share.

`impl` is "auto", "eager" or "triton", the last keyword of every op that has a kernel; those of GLUON_OPS have another
kernel, "gluon". A named implementation runs or raises its reason; it never falls back. "auto" is "eager" (which
torch.compile fuses with the rest of a model) unless a measurement says that the kernel wins: an entry of measured.json
for this architecture, or of the file that `python -m golfgpt_kernels tune` wrote on this machine for this GPU and these
versions. It logs once per op what it chose on a GPU and why. `set_implementation` gives "auto" another meaning for the
whole process.

Checks of dtype, shape and device always run. Checks of values (NaN, targets outside the vocabulary) would make the
host wait for a GPU and break a compiled graph: they run only for CPU tensors outside torch.compile.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ._jit import INTERPRETING, MISSING
from ._tiles import compute_capability

Impl = Literal["auto", "triton", "eager"]
GluonImpl = Literal["auto", "triton", "gluon", "eager"]  # of GLUON_OPS
GLUON_OPS = ("linear_relu2", "relu2_mlp")

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

log = logging.getLogger("golfgpt_kernels")

# Of impl="auto", in general and for single ops; torch.compile guards on them, so that a change recompiles.
_meaning: Impl = "auto"
_meanings: Mapping[str, GluonImpl] = {}


class set_implementation:
    """What impl="auto" means from now on, in the whole process: "eager" or "triton", as if every op were called with
    that name, or "auto", the choice by measurements. `ops` (name -> implementation) have a meaning of their own; names
    are those of `implementation`, and "linear_relu2" and "relu2_mlp" can be "gluon" too. In a `with` statement the
    former meaning returns at the end. Raises ValueError for unknown names."""

    def __init__(self, impl: Impl, ops: Mapping[str, GluonImpl] | None = None):
        global _meaning, _meanings
        ops = dict(ops or {})
        for op, meaning in {"": impl, **ops}.items():
            if meaning not in ("auto", "eager", "triton") and (meaning != "gluon" or op not in GLUON_OPS):
                where = f" for {op}" if op else ""
                raise ValueError(f"set_implementation: {meaning!r}{where}; expected 'auto', 'eager' or 'triton'")
        if unknown := [op for op in ops if op not in op_dtypes()]:
            raise ValueError(f"set_implementation: op {unknown[0]!r}; expected some of {', '.join(op_dtypes())}")
        self.former, _meaning, _meanings = (_meaning, _meanings), impl, ops

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        global _meaning, _meanings
        _meaning, _meanings = self.former


def resolve(op: str, impl: GluonImpl) -> GluonImpl:
    """`impl`, or for "auto" what set_implementation made of it for `op`."""
    return _meanings.get(op, _meaning) if impl == "auto" else impl


def op_dtypes() -> dict[str, torch.dtype]:
    """The ops of which impl="auto" decides one by one, and the dtype in which `tune` measures each."""
    from ._cases import QUICK  # which imports the ops, and they this file

    return {case.op: case.dtype for case in QUICK}


def runs_triton(op: str, impl: Impl, tensor: Tensor, rows: int) -> bool:
    """Whether the kernel computes `op` for this tensor's device and dtype and `rows` rows of input, or the reference.

    Raises ValueError for an unknown impl, RuntimeError with the reasons where "triton" cannot run.
    """
    impl = resolve(op, impl)
    if impl == "eager":
        return False
    if impl == "auto":
        if tensor.device.type != "cuda":
            return False
        least = _least_rows(op, tensor.device, tensor.dtype)
        return least is not None and rows >= least
    if impl != "triton":
        choices = "'auto', 'triton', 'gluon' or 'eager'" if op == "relu2_mlp" else "'auto', 'triton' or 'eager'"
        raise ValueError(f"{op}: impl={impl!r}; expected {choices}")
    if reason := cannot_run(tensor.device, tensor.dtype):
        raise RuntimeError(f"impl='triton' cannot run: {reason}; impl='eager' can")
    return True


def implementation(op: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """What impl="auto" means for `op` there: ("triton" or "eager", or what set_implementation says; the reason in one
    sentence). Raises ValueError for an unknown op, device or dtype."""
    tuned = op_dtypes()
    if op not in tuned:
        raise ValueError(f"implementation: op={op!r}; expected one of {', '.join(tuned)}")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"implementation: dtype={dtype!r}; expected one of torch's, such as torch.bfloat16")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"implementation: device={device!r}; expected one of torch's, such as 'cuda'") from None
    if (meaning := resolve(op, "auto")) != "auto":
        return meaning, f"set_implementation({meaning!r})"
    if device.type != "cuda":
        return "eager", "kernels are for GPUs"
    if reason := cannot_run(device, dtype):
        return "eager", reason
    if entries := _measurements(op, device, dtype):
        worst = max(entries, key=against_best)
        if not worst["correct"]:
            wrong = f": {why}" if (why := worst.get("failed", {}).get("triton")) else ""
            return "eager", f"{worst['gpu']}, {worst['date']}: the kernel failed its check{wrong}"
        ratio = f"at worst {against_best(worst):.2f} x the faster of eager and torch.compile"
        why = f"{worst['gpu']}, {worst['date']}: {ratio}"
        if against_best(worst) >= 1:
            return "eager", why
        return "triton", f"{why}; from {_rows_needed(entries):,} rows of input on"
    never = f"the kernel was never measured on {torch.cuda.get_device_name(device)} (sm_{compute_capability(device)})"
    command = "`python -m golfgpt_kernels tune`"
    if dtype == tuned[op]:
        return "eager", f"{never}; {command} does"
    return "eager", f"{never} in {dtype_name(dtype)}; {command} measures {dtype_name(tuned[op])}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, Any]:
    """GPU and versions that a measurement is of."""
    if device.type != "cuda":
        return {"gpu": "none", "sm": 0, "torch": torch.__version__, "triton": None}
    import triton

    gpu = {"gpu": torch.cuda.get_device_name(device), "sm": compute_capability(device)}
    return gpu | {"torch": torch.__version__, "triton": triton.__version__}


def slug(environment: dict[str, Any]) -> str:
    """GPU and versions as part of a file's name."""
    name = f"{environment['gpu']}-torch{environment['torch']}-triton{environment['triton']}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def tuned_file(device: torch.device) -> Path:
    """Where `python -m golfgpt_kernels tune` keeps what it measured for this GPU, torch and triton."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "golfgpt" / f"{slug(environment(device))}.json"


def _least_rows(op: str, device: torch.device, dtype: torch.dtype) -> int | None:
    """From how many rows on "auto" is the kernel: half of the smallest count it won at; None for never."""
    return least_rows_cached(op, device, dtype)


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: that takes as long as torch's.
_least_rows._dynamo_marked_constant = True


@functools.cache
def least_rows_cached(op: str, device: torch.device, dtype: torch.dtype) -> int | None:
    chosen, why = implementation(op, device, dtype)
    log.warning("%s on %s in %s: %s (%s)", op, device, dtype_name(dtype), chosen, why)
    if chosen == "eager":
        return None
    return _rows_needed(_measurements(op, device, dtype))


def _rows_needed(entries: list[dict]) -> int:
    return min(entry["rows"] for entry in entries) // 2


def against_best(entry: dict) -> float:
    """The kernel's time over the best other column (eager, torch.compile, another form); infinite if it is wrong."""
    us = entry["us"]
    return us["triton"] / min(us[column] for column in us if column != "triton") if entry["correct"] else float("inf")


def _measurements(op: str, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """What was timed on this very GPU if anything was, else what was committed for its architecture."""
    committed = [
        e for e in read_entries(Path(__file__).parent / "measured.json") if e["sm"] == compute_capability(device)
    ]
    for entries in (read_entries(tuned_file(device)), committed):
        if found := [e for e in entries if e["op"] == op and e["dtype"] == dtype_name(dtype)]:
            return found
    return []


def read_entries(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def cannot_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why impl="triton" would raise for tensors of this device and dtype; None if it would run."""
    reasons = [MISSING]
    if device.type == "cuda":
        if compute_capability(device) < 80:
            reasons.append(f"{torch.cuda.get_device_name(device)} is older than sm_80")
    elif device.type != "cpu" or not INTERPRETING:
        there = "no CUDA device" if not torch.cuda.is_available() else f"tensors are on {device}, not on CUDA"
        reasons.append(f"{there} (TRITON_INTERPRET=1, set before the import, interprets kernels on CPU)")
    if dtype not in KERNEL_DTYPES:
        reasons.append(f"kernels compute in {', '.join(map(str, KERNEL_DTYPES))}, not in {dtype}")
    return "; ".join(filter(None, reasons)) or None


def autocast(x: Tensor) -> Tensor:
    """x as F.linear would take it: in autocast's dtype where autocast is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def check_floats(op: str, **tensors: Tensor) -> None:
    """Each is a matrix operand of a dtype that ops compute in, and all are on one device."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} is a {type(tensor).__name__}; expected a Tensor")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; expected one of {FLOAT_DTYPES}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the tensor before it on {device}; use one device")
        device = tensor.device


def check_linear(op: str, x: Tensor, w: Tensor, x_name: str = "x", w_name: str = "w") -> None:
    """x (..., K) against w (N, K)."""
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"{op}: {x_name} has shape {tuple(x.shape)} and {w_name} {tuple(w.shape)}; expected (..., K) and (N, K)"
        )


def values_readable(tensor: Tensor) -> bool:
    """Reading values costs nothing here: no GPU to wait for, no graph to break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64 input, so that each reference is its own float64 oracle."""
    return torch.promote_types(dtype, torch.float32)
