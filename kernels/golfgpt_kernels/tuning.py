"""Is a kernel right and fast on this GPU? `python -m golfgpt_kernels tune` checks and times each at a trainer's sizes.

An entry is what impl="auto" reads, from measured.json or from the file that `tune` writes:

    op, sm, gpu, dtype, rows    what it speaks for; dtype and rows as the op's dispatch sees them
    shape, direction            "forward" or "forward+backward"
    us, spread, how             {column: value} of `timing.time_us`
    failed                      {column: why}
    correct                     whether the kernel agrees with eager and was timed; otherwise it is never chosen
    torch, triton, command, date

Columns are "eager", "compile" (torch.compile of eager), "triton" (the kernel), and for "codes_linear" the kernel of the
"compute_copy" form, which it must beat too.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from . import _dispatch
from ._cases import COLUMNS, QUICK, Case, check, column_function, input_sets
from ._dispatch import dtype_name, environment, tuned_file
from .timing import time_us, within

COMMAND = "python -m golfgpt_kernels tune"
NEEDS_GPU = "tuning needs a CUDA device that this torch can use: interpreted kernels are never timed"


def measure(case: Case, device: torch.device, *, command: str, columns: Sequence[str] | None = None) -> dict:
    """The entry of `case`. The kernel is checked before it is timed."""
    entry = environment(device) | {
        "op": case.op, "dtype": dtype_name(case.dtype), "rows": case.rows, "shape": list(case.shape),
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
