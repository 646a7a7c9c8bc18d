"""Is a kernel right and fast on this GPU? `python -m golfgpt_kernels tune` checks and times each at a trainer's sizes.

An entry is what impl="auto" reads, from measured.json or from the file that `tune` writes:

    op, sm, gpu, dtype, rows    what it speaks for; dtype and rows as the op's dispatch sees them
    shape, direction            "forward" or "forward+backward"
    us, spread, how             {column: value} of `timing.time_us`
    failed                      {column: why}
    correct                     whether the kernel agrees with eager and was timed; otherwise it is never chosen
    torch, triton, command, date

Columns are "eager", "compile" (torch.compile of eager), "triton" (the kernel), and for "codes_linear" the kernel of the
"shadow" form, which it must beat too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from . import _dispatch
from ._cases import COLUMNS, QUICK, Case
from ._dispatch import environment, tuned_file
from .testing import budget_violation, poisoned
from .timing import time_us

COMMAND = "python -m golfgpt_kernels tune"
NEEDS_GPU = "tuning needs a CUDA device that this torch can use: interpreted kernels are never timed"


# ---- check


def check(case: Case, device: torch.device, rows: int = 4096) -> str | None:
    """Why the kernel of `case` is wrong on `device`, or None. One that is not exact keeps the error budget against
    float64 on `rows` rows, and differs from eager at full size by no more than is allowed."""
    if not case.exact:
        ours, eager, oracle = (outputs(case, device, rows, *way) for way in (("triton",), ("eager",), ("eager", True)))
        for name, actual in ours.items():
            if violation := budget_violation(actual, eager[name], oracle[name]):
                return f"{name} at {min(rows, case.rows)} rows: {violation}"
        del ours, eager, oracle, actual
    actual, eager = (outputs(case, device, case.rows, impl) for impl in ("triton", "eager"))
    return disagreement(actual, eager, allowed_difference(case, device, rows))


def allowed_difference(case: Case, device: torch.device, rows: int = 4096) -> dict[str, float]:
    """Between two good results, relative in the 2-norm: 4 times eager's own error on `rows` rows."""
    if case.exact:
        return {}
    eager, oracle = (outputs(case, device, rows, "eager", double) for double in (False, True))
    return {name: 4 * relative(out, oracle[name]) + torch.finfo(out.dtype).eps for name, out in eager.items()}


def outputs(case: Case, device: torch.device, rows: int, impl: str, double: bool = False) -> dict[str, Tensor]:
    """Of new inputs each time, since some ops change theirs."""
    inputs = case.make(device, 1, min(rows, case.rows), double)
    with poisoned() if impl == "triton" else contextlib.nullcontext():
        return case.run(inputs, impl)


def disagreement(actual: dict[str, Tensor], eager: dict[str, Tensor], allowed: dict[str, float]) -> str | None:
    """Why they differ too much; where nothing is allowed they must be equal."""
    for name, value in actual.items():
        if torch.equal(value, eager[name]):
            continue
        if name not in allowed:
            return f"{name}: {(value != eager[name]).sum().item()} of {value.numel()} values differ from eager's"
        if not (difference := relative(value, eager[name])) <= allowed[name]:
            return f"{name}: differs from eager by {difference:.2e}, expected at most {allowed[name]:.2e}"
    return None


def relative(value: Tensor, reference: Tensor) -> float:
    reference = reference.to(torch.promote_types(reference.dtype, torch.float32))
    return ((value - reference).norm() / reference.norm()).item()


# ---- measure


def measure(case: Case, device: torch.device, *, command: str, columns: Sequence[str] | None = None) -> dict:
    """The entry of `case`. The kernel is checked before it is timed."""
    entry = environment(device) | {
        "op": case.op, "dtype": str(case.dtype).removeprefix("torch."), "rows": case.rows, "shape": list(case.shape),
        "direction": case.direction, "us": {}, "spread": {}, "how": {}, "failed": {}, "correct": False,
        "command": command, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    columns = case.columns if columns is None else columns
    if "triton" in columns:
        with _failure(entry, "triton"):
            if violation := check(case, device):
                entry["failed"]["triton"] = violation
    sets = input_sets(case, device)
    for column in columns:
        if column not in entry["failed"]:
            with _failure(entry, column):
                timing = time_us(column_function(case, column), sets, device)
                entry["us"][column], entry["spread"][column] = round(timing.us, 3), round(timing.spread, 4)
                if timing.how:
                    entry["how"][column] = timing.how
    entry["correct"] = "triton" in entry["us"]
    return entry


@contextlib.contextmanager
def _failure(entry: dict, column: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise
    except Exception as error:
        entry["failed"][column] = reason(error)


def reason(error: Exception) -> str:
    """One line for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def input_sets(case: Case, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Sets of random inputs, more than four times L2 together and two at least."""
    first, count = case.make(device, 0), 2
    if device.type == "cuda":
        size = sum(value.numel() * value.element_size() for value in first)
        count = max(2, math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / size))
    return [first, *(case.make(device, seed) for seed in range(1, count))]


def column_function(case: Case, column: str) -> Callable[[tuple[Tensor, ...]], object]:
    """What `column` times. Compiled anew, so that recompilation limits do not add up over cases."""
    if column != "compile":
        return partial(case.run, impl=column)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: case.call(*inputs, impl="eager"), fullgraph=True, dynamic=False)
    return partial(case.run, call=compiled)


def decides(entry: dict) -> bool:
    """Whether impl="auto" can read it: all three columns, or a kernel that failed."""
    return set(COLUMNS) <= entry["us"].keys() or "triton" in entry["failed"]


def merged(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """`old` with `new` in the place of what was measured for the same."""

    def key(entry: dict) -> tuple:
        return (*(entry[name] for name in ("op", "sm", "gpu", "dtype", "direction")), *entry["shape"])

    return list(({key(entry): entry for entry in old} | {key(entry): entry for entry in new}).values())


def write_json(file: str | os.PathLike, value: object) -> None:
    """Replaced at once, so that a reader or a killed writer never sees half of it."""
    text = json.dumps(value, indent=1)
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    temporary = f"{os.fspath(file)}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(text + "\n")
    os.replace(temporary, file)


# ---- tune


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread when the time is up, and every second after it: compilers wrap or swallow one."""

    def stop(*_args) -> None:
        raise TimeoutError(f"the time is up: {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def within(seconds: float, cases: Sequence[Case], measure: Callable[[Case], dict]) -> Iterator[dict | None]:
    """The entry of each case, None where the time did not suffice."""
    stop = time.monotonic() + seconds
    for case in cases:
        entry, left = None, stop - time.monotonic()
        try:
            if left > 0:
                with time_limit(left):
                    entry = measure(case)
        except Exception:  # after the limit, this may be the limit itself, wrapped
            if time.monotonic() < stop:
                raise
        yield entry if time.monotonic() < stop else None


class CannotTune(RuntimeError):
    """No CUDA device, no triton, or a GPU on which kernels do not run."""


def tune(
    device: torch.device,
    *,
    seconds: float = 50.0,
    command: str = COMMAND,
    cases: Sequence[Case] = QUICK,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Check and time each kernel, in the main thread; write what impl="auto" reads, and say what it chooses now.

    With the default `seconds` a process that does nothing else ends within 60 s.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise CannotTune(NEEDS_GPU)
    if why := _dispatch.cannot_run(device, torch.bfloat16):
        raise CannotTune(f"tuning needs kernels that run: {why}")
    file, entries = tuned_file(device), []
    say(f"{'case':58}" + "".join(f"{column + ' us':>12}" for column in COLUMNS) + "  check")
    found = within(seconds, cases, partial(measure, device=device, command=command))
    for case, entry in zip(cases, found, strict=True):
        if entry is None:
            say(f"{case.name:58}{'':36}  not measured: the time was up")
            continue
        say(table_row(case, entry))
        entries.append(entry)
        write_json(file, merged(_dispatch.read_entries(file), [e for e in entries if decides(e)]))
    _dispatch.least_rows_cached.cache_clear()
    say(f'\nWritten to {file}. impl="auto" on {torch.cuda.get_device_name(device)} is now:')
    for case in cases:
        chosen, why = _dispatch.implementation(case.op, device, case.dtype)
        say(f"{case.op:24}{chosen:8}{why}")
    return entries


def table_row(case: Case, entry: dict) -> str:
    us = "".join(f"{entry['us'][column]:12.1f}" if column in entry["us"] else f"{'-':>12}" for column in COLUMNS)
    failed = "; ".join(f"{column}: {why}" for column, why in entry["failed"].items())
    return f"{case.name:58}{us}  {failed or ('passed' if entry['correct'] else '-')}"
