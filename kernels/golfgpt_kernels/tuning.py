"""Is a kernel right and fast here? Cases at the trainer's shapes, their check, their timing, and `tune`.

    from golfgpt_kernels import tuning
    tuning.tune(torch.device("cuda"))     # at most 60 s; `python -m golfgpt_kernels tune` does it

A case is one op at one shape and direction with random inputs. Its check holds the kernel to the error budget
of testing.py against a float64 oracle on fewer rows, and compares it with eager at full size. Its columns are
"eager", "compile" (torch.compile of eager) and "triton" (the kernel, called as it is).

An entry is what impl="auto" reads, from measured.json or from the file that `tune` writes:

    op, sm, gpu, dtype, rows    what it speaks for; dtype and rows as the op's dispatch sees them
    shape, direction            "forward" or "forward+backward"
    us                          {column: microseconds per call}; a column that was not timed is missing
    spread                      {column: (90th - 10th percentile) / median over the replays}
    how                         {column: why} where the calls could not be captured in a CUDA graph
    failed                      {column: why}; "triton" also where it ran and broke its budget
    correct                     whether the kernel passed its check: false never wins, whatever its time
    flops, bytes                the least that the op must compute and move
    torch, triton, command, date

On a GPU the calls are captured in one CUDA graph, so that the host's launch costs stay out for every column
alike, over several sets of inputs that exceed L2 together four times: no call finds its inputs there. The
figure is the median over replays. On a CPU it is the clock's, for eager and compile only: interpreted kernels
are never timed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import _dispatch, _jit
from ._cases import CASES, COLUMNS, QUICK, SMALL, Case, Inputs
from ._dispatch import tuned_file
from ._tiles import compute_capability
from .testing import budget_violation, poisoned

__all__ = [
    "CASES", "COLUMNS", "QUICK", "SMALL", "CannotTune", "Case", "cases", "check", "measure", "time_us", "tune",
    "tuned_file",
]  # fmt: skip

COMMAND = "python -m golfgpt_kernels tune"
NEEDS_GPU = "tuning needs a CUDA device that this torch can use: interpreted kernels are never timed"


def cases(*ops: str) -> tuple[Case, ...]:
    """The cases of these ops, in the size that this machine is for."""
    return tuple(case for op in ops for case in (CASES if torch.cuda.is_available() else SMALL) if case.op == op)


# ---- check


def check(case: Case, device: torch.device, rows: int = 4096) -> str | None:
    """Why the kernel of `case` is wrong on `device`, or None. RuntimeError where it cannot run."""
    case = case.checked_as or case
    if not case.exact:
        results = [outputs(case, device, 1, rows, *way) for way in _WAYS]
        for name, actual in results[0].items():
            if violation := budget_violation(actual, results[1][name], results[2][name]):
                return f"{name} at {min(rows, case.rows)} rows: {violation}"
        del results, actual
    actual, rival = (outputs(case, device, 2, case.rows, *way) for way in _WAYS[:2])
    return disagreement(actual, rival, allowances(case, device, rows))


def allowances(case: Case, device: torch.device, rows: int = 4096) -> dict[str, float]:
    """How far two good results may differ, relative in the 2-norm: 4 times eager's own error on `rows` rows."""
    if case.exact:
        return {}
    eager, oracle = (outputs(case, device, 1, rows, *way) for way in _WAYS[1:])
    return {name: 4 * relative(eager[name], oracle[name]) + torch.finfo(eager[name].dtype).eps for name in eager}


def disagreement(actual: dict[str, Tensor], rival: dict[str, Tensor], allowed: dict[str, float]) -> str | None:
    """Why they differ too much at full size, where there is no oracle; without an allowance they must be equal."""
    for name, value in actual.items():
        if torch.equal(value, rival[name]):
            continue
        if name not in allowed:
            return f"{name}: {(value != rival[name]).sum().item()} of {value.numel()} values differ from eager's"
        difference = relative(value, rival[name])
        if not difference <= allowed[name]:
            return f"{name}: differs from eager by {difference:.2e}, possible: {allowed[name]:.2e}"
    return None


# The kernel, eager, and eager in float64.
_WAYS = ("triton", False), ("eager", False), ("eager", True)


def outputs(case: Case, device: torch.device, seed: int, rows: int, impl: str, double: bool) -> dict[str, Tensor]:
    """Inputs are drawn again for each, since some ops change theirs."""
    inputs = case.make(device, seed, min(rows, case.rows))
    if double:
        inputs = {name: _double(value) for name, value in inputs.items()}
    with poisoned() if impl == "triton" else contextlib.nullcontext():
        return case.run(inputs, impl)


def _double(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def relative(value: Tensor, reference: Tensor) -> float:
    reference = reference.to(torch.promote_types(reference.dtype, torch.float32))
    return ((value - reference).norm() / reference.norm()).item()


# ---- timing


class Timing(NamedTuple):
    us: float  # per call, the median
    spread: float  # (90th - 10th percentile) / median
    how: str | None = None  # why it is not of a CUDA graph, on a GPU


class Calls(NamedTuple):
    """`replay()` runs `count` calls to their end."""

    replay: Callable[[], None]
    count: int
    seconds: Callable[[], float]  # of one replay
    how: str | None = None


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Sets of random inputs, more than four times L2 together and two at least."""
    first = case.make(device, 0)
    if device.type != "cuda":
        return [first, case.make(device, 1)]
    size = sum(value.numel() * value.element_size() for value in first.values())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(case.make(device, seed) for seed in range(1, max(2, math.ceil(4 * cache / size))))]


def column_function(case: Case, column: str) -> Callable[[Inputs], object]:
    """What `column` times. Compiled anew, so that recompilation limits do not add up over cases."""
    if column != "compile":
        return partial(case.run, impl=column)
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: case.call(inputs, "eager"), fullgraph=True, dynamic=False)
    return partial(case.run, call=compiled)


def prepare(function: Callable[[Inputs], object], sets: Sequence[Inputs], device: torch.device) -> Calls:
    """Calls of `function` over all `sets` in turn; on a GPU one CUDA graph of 5 ms or more."""
    if device.type != "cuda":
        return _clocked(function, sets)
    # Warmed up and captured on one stream: autograd remembers the stream that a leaf was used on, and a capture may
    # not wait for another. Three rounds: compilation of forward and backward, cuBLAS workspaces, module loads.
    stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(3):
            start.record()
            for inputs in sets:
                function(inputs)
            end.record()
        end.synchronize()
    rounds = min(50, max(1, math.ceil(5 / start.elapsed_time(end))))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for inputs in sets:
                    function(inputs)
    except TimeoutError:
        raise
    except Exception as error:  # whatever an op does that a graph does not allow
        torch.cuda.set_stream(before)  # a capture that fails to end leaves its own
        rounds, how = 1, f"timed without a CUDA graph: {type(error).__name__}: {error}"

        def replay() -> None:
            for inputs in sets:
                function(inputs)
    else:
        how, replay = None, graph.replay

    def seconds() -> float:
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def to_the_end() -> None:
        replay()
        torch.cuda.synchronize(device)

    return Calls(to_the_end, rounds * len(sets), seconds, how)


def _clocked(function: Callable[[Inputs], object], sets: Sequence[Inputs]) -> Calls:
    def replay() -> None:
        for inputs in sets:
            function(inputs)

    def seconds() -> float:
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start

    replay()  # compiles
    return Calls(replay, len(sets), seconds)


def time_calls(calls: Calls, seconds: float = 0.3) -> Timing:
    """The median over at least 5 and at most 100 replays, after one that is not counted."""
    calls.seconds()
    stop = time.perf_counter() + seconds
    times = []
    while len(times) < 5 or (len(times) < 100 and time.perf_counter() < stop):
        times.append(calls.seconds() * 1e6 / calls.count)
    times.sort()
    low, middle, high = (times[int(share * (len(times) - 1))] for share in (0.1, 0.5, 0.9))
    return Timing(middle, (high - low) / middle, calls.how)


def time_us(function: Callable[[Inputs], object], sets: Sequence[Inputs], device: torch.device) -> Timing:
    return time_calls(prepare(function, sets, device))


# ---- entries


def new_entry(case: Case, device: torch.device, command: str) -> dict:
    return environment(device) | {
        "op": case.op, "dtype": str(case.dtype).removeprefix("torch."), "rows": case.rows, "shape": list(case.shape),
        "direction": case.direction, "us": {}, "spread": {}, "how": {}, "failed": {}, "correct": False,
        "flops": case.cost[0], "bytes": case.cost[1], "command": command, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def environment(device: torch.device) -> dict:
    if device.type == "cuda":
        import triton

        versions = {"torch": torch.__version__, "triton": triton.__version__}
        return {"gpu": torch.cuda.get_device_name(device), "sm": compute_capability(device)} | versions
    return {"gpu": "none", "sm": 0, "torch": torch.__version__, "triton": None}


def slug(environment: dict) -> str:
    """GPU and versions as part of a file's name."""
    name = f"{environment['gpu']}-torch{environment['torch']}-triton{environment['triton']}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def judge(case: Case, device: torch.device, entry: dict) -> bool:
    """Check the kernel into `entry`; whether it runs at all and can be timed."""
    try:
        violation = check(case, device)
    except TimeoutError:
        raise
    except Exception as error:
        entry["failed"]["triton"] = reason(error)
        return False
    entry["correct"] = violation is None
    if violation:
        entry["failed"]["triton"] = violation
    return True


def reason(error: Exception) -> str:
    """One line for a table: what a user can act on stands in the first lines of an error."""
    text = " ".join(str(error).split())
    return text[:300] if has_no_kernel(text) else f"{type(error).__name__}: {text[:300]}"


def has_no_kernel(why: str) -> bool:
    return "impl='triton' cannot run" in why


def measure(case: Case, device: torch.device, *, command: str, columns: Sequence[str] | None = None) -> dict:
    """The entry of `case`. A column that fails is missing from "us" and says why under "failed"."""
    entry = new_entry(case, device, command)
    columns = list(case.columns if columns is None else columns)
    if "triton" in columns and not judge(case, device, entry):
        columns.remove("triton")
    sets = input_sets(case, device)
    for column in columns:
        try:
            timing = time_us(column_function(case, column), sets, device)
        except TimeoutError:
            raise
        except Exception as error:
            entry["failed"][column] = reason(error)
            entry["correct"] &= column != "triton"
            continue
        add_timing(entry, column, timing)
    return entry


def add_timing(entry: dict, column: str, timing: Timing) -> None:
    entry["us"][column] = round(timing.us, 3)
    entry["spread"][column] = round(timing.spread, 4)
    if timing.how:
        entry["how"][column] = timing.how


def decides(entry: dict) -> bool:
    """Whether impl="auto" can read it: all three columns, or a kernel that failed."""
    return set(COLUMNS) <= entry["us"].keys() or (
        "triton" in entry["failed"] and not has_no_kernel(entry["failed"]["triton"])
    )


def merged(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """`old` with `new` in the place of what was measured for the same."""

    def key(entry: dict) -> tuple:
        return (*(entry[name] for name in ("op", "sm", "gpu", "dtype", "direction")), *entry["shape"])

    return list(({key(entry): entry for entry in old} | {key(entry): entry for entry in new}).values())


def write_json(file: str | os.PathLike, value: object) -> None:
    """Replaced at once, so that a reader or a killed writer never sees half of it. A list has one line per item."""
    text = json.dumps(value, indent=1)
    if isinstance(value, list):
        text = "[" + ",".join("\n" + json.dumps(item) for item in value) + "\n]"
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


def within(
    seconds: float, cases: Sequence[Case], measure: Callable[[Case], dict]
) -> Iterator[tuple[Case, dict | None]]:
    """Each case and its entry, None for those that the time did not suffice for."""
    stop = time.monotonic() + seconds
    for case in cases:
        entry, left = None, stop - time.monotonic()
        try:
            if left > 0:
                with time_limit(left):
                    entry = measure(case)
        except Exception:  # after the limit whatever was raised may be the limit, wrapped
            if time.monotonic() < stop:
                raise
        yield case, entry if time.monotonic() < stop else None


class CannotTune(RuntimeError):
    """There is nothing here to time: no CUDA device, or no triton."""


def tune(
    device: torch.device,
    *,
    seconds: float = 50.0,
    command: str = COMMAND,
    cases: Sequence[Case] = QUICK,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Check and time each kernel, in the main thread; write what impl="auto" reads, and say what it does now.

    With the default `seconds` a process that does nothing else ends within 60 s.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise CannotTune(NEEDS_GPU)
    if _jit.MISSING:
        raise CannotTune(f"tuning needs triton: {_jit.MISSING}")
    file = tuned_file(device)
    entries = []
    say(table_head())
    for case, entry in within(seconds, cases, partial(measure, device=device, command=command)):
        say(table_row(case, entry))
        if entry is not None:
            entries.append(entry)
            write_json(file, merged(_dispatch._read(file), [e for e in entries if decides(e)]))
    _dispatch._least_rows_said.cache_clear()
    say(f'\nWritten to {file}. impl="auto" on {torch.cuda.get_device_name(device)} is now:')
    for case in cases:
        chosen, why = _dispatch.implementation(case.op, device, case.dtype)
        say(f"{case.op:24}{chosen:8}{why}")
    return entries


def table_head() -> str:
    return f"{'case':58}" + "".join(f"{column + ' us':>12}" for column in COLUMNS) + "  check"


def table_row(case: Case, entry: dict | None) -> str:
    if entry is None:
        return f"{case.name:58}" + " " * 36 + "  not measured: the time was up"
    us = "".join(f"{entry['us'][column]:12.1f}" if column in entry["us"] else f"{'-':>12}" for column in COLUMNS)
    failed = "; ".join(f"{column}: {why}" for column, why in entry["failed"].items())
    return f"{case.name:58}{us}  {failed or 'passed'}"
