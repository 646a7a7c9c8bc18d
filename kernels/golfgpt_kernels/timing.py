"""How long a call takes, on a GPU without what the host adds, on a CPU by the clock; and limits of time."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    us: float  # per call, the median
    spread: float  # (90th - 10th percentile) / median
    how: str | None = None  # why it is not of a CUDA graph, on a GPU


def time_us(
    function: Callable[[Any], object], sets: Sequence[Any], device: torch.device, seconds: float = 0.3
) -> Timing:
    """Time `function` over all `sets` of inputs in turn: at least 5 and at most 100 times, as long as `seconds` last.

    On a GPU the calls are captured in one CUDA graph of at least 5 ms. Give it sets that exceed L2 together, so that
    no call finds its inputs there.
    """

    def calls() -> None:
        for inputs in sets:
            function(inputs)

    rounds, how, replay = 1, None, calls
    if device.type == "cuda":
        rounds, how, replay = _graph(calls, device)
    else:
        calls()  # compiles
    times = []
    stop = time.perf_counter() + seconds
    while len(times) < 6 or (len(times) <= 100 and time.perf_counter() < stop):
        times.append(_seconds(replay, device) * 1e6 / (rounds * len(sets)))
    times = sorted(times[1:])  # the first is another warm-up
    low, middle, high = (times[int(fraction * (len(times) - 1))] for fraction in (0.1, 0.5, 0.9))
    return Timing(middle, (high - low) / middle, how)


def _seconds(replay: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _graph(calls: Callable[[], None], device: torch.device) -> tuple[int, str | None, Callable[[], None]]:
    """Rounds of `calls` in a CUDA graph, why there is no graph, and what replays it."""
    # Warmed up and captured on one stream: autograd remembers the stream that a leaf was used on, and a capture may
    # not wait for another. Three rounds: compilation of forward and backward, cuBLAS workspaces, module loads.
    stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        took = [_seconds(calls, device) for _ in range(3)]
    rounds = min(50, max(1, math.ceil(5e-3 / took[-1])))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                calls()
    except TimeoutError:
        raise
    except Exception as error:  # an op may do what a graph does not allow
        torch.cuda.set_stream(before)  # a capture that fails to end leaves its own
        return 1, f"timed without a CUDA graph: {type(error).__name__}: {error}", calls
    return rounds, None, graph.replay


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


def within(seconds: float, cases: Sequence[Any], measure: Callable[[Any], Any]) -> Iterator[Any]:
    """measure(case) of each case, in the main thread; None where the time did not suffice."""
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
