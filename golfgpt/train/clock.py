"""Time: where the seconds of a run went, which of them count against the budget, and whether another step fits."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from golfgpt.config import ScheduleConfig
from golfgpt.optim.schedule import crosses_cap

PHASES = ("setup", "compile", "train", "checkpoint", "validate", "export", "eval")
COUNTED = ("train",)


class Ledger:
    """Seconds per phase. Phases nest: the inner one pauses the outer one."""

    def __init__(self, seconds: dict[str, float] | None = None, now: Callable[[], float] = time.perf_counter):
        self.seconds = {phase: 0.0 for phase in PHASES} | (seconds or {})
        self._now = now
        self._stack: list[str] = []
        self._since = now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time inside the block under `name`."""
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        now = self._now()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def elapsed(self, name: str) -> float:
        """Seconds booked under `name` so far, the running block included."""
        self._book()
        return self.seconds[name]

    def report(self) -> list[tuple[str, float, bool]]:
        """(phase, seconds, counted against the budget) for every phase."""
        self._book()
        return [(name, self.seconds[name], name in COUNTED) for name in PHASES]


class Pace:
    """Rank 0's training clock as every rank knows it, and how long this rank's steps take.

    The learning rate depends on the clock, so all ranks must read the same one: rank 0's, which is summed with the
    gradients (`sync`). A step that is enqueued before the previous result is read does not know it yet and extrapolates
    from the last two readings. Up to `ahead` steps may be enqueued like that.
    """

    def __init__(self, schedule: ScheduleConfig, ahead: int = 0):
        self._schedule, self._ahead = schedule, ahead
        self.known = (0, 0.0)
        """A step, the last whose start on rank 0's clock is known, and that clock."""
        self._step_seconds = 0.0
        self._ended = 0.0
        self.settling = True
        """True until the first two steps of this execution are over. The first includes work that is done once, so
        there is no duration to judge by yet, and nothing is enqueued ahead."""
        self._recent: deque[float] = deque(maxlen=32)

    def sync(self, step: int, seconds: float) -> None:
        """Take `seconds` as rank 0's clock at the start of `step`; every rank calls it."""
        known, before = self.known
        if step > known:
            self._step_seconds = (seconds - before) / (step - known)
        self.known = (step, seconds)

    def seconds_at(self, step: int) -> float:
        """Rank 0's clock at the start of `step`; the same on every rank."""
        known, seconds = self.known
        return seconds + (step - known) * self._step_seconds

    def start(self, seconds: float) -> None:
        """Training begins, or goes on, at `seconds` of this rank's clock."""
        self._ended = seconds

    def step_over(self, seconds: float) -> float:
        """A step is known to be over at `seconds` of this rank's clock; returns its duration."""
        duration, self._ended = seconds - self._ended, seconds
        if self.settling and len(self._recent) == 1:
            self._recent.clear()
            self.settling = False
        self._recent.append(duration)
        return duration

    @property
    def taken(self) -> int:
        """Recent durations known, at most 32; that of the first step is dropped when the second is over."""
        return len(self._recent)

    @property
    def slowest(self) -> float:
        """Seconds of the slowest recent step."""
        return max(self._recent, default=0.0)

    @property
    def mean(self) -> float:
        """Seconds of a recent step."""
        return sum(self._recent) / len(self._recent)

    def crosses_cap(self, begun: float) -> bool:
        """Whether steps beyond those on their way could end after the cap, when one began at `begun` of this clock."""
        slowest = 0.0 if self.settling else self.slowest
        return crosses_cap(begun, slowest * (1 + self._ahead), self._schedule)
