"""Time of a run: seconds per phase, which phases count against the budget, and whether another step fits."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from golfgpt.config import ScheduleConfig
from golfgpt.optim.schedule import crosses_cap

PHASES = ("setup", "trials", "compile", "train", "checkpoint", "validate", "calibrate", "export", "eval")
COUNTED = ("train", "calibrate")


class Ledger:
    """Seconds per phase. Phases can be nested; an inner phase pauses the outer one."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._now = now
        self._stack: list[str] = []
        self._since = now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as phase `name`."""
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
        """Seconds of phase `name` so far, including the running block."""
        self._book()
        return self.seconds[name]

    def report(self) -> list[tuple[str, float, bool]]:
        """(phase, seconds, whether it counts against the budget) for every phase."""
        self._book()
        return [(name, self.seconds[name], name in COUNTED) for name in PHASES]


class Pace:
    """Rank 0's training clock as known on every rank, and the durations of this rank's steps.

    The learning rate depends on the clock, so all ranks must use the same one: rank 0's, which is sent with the
    gradients (`sync`). When a step is enqueued before the previous result is read, the clock is not known yet and is
    extrapolated from the last two readings. Up to `ahead` steps may be enqueued like that.
    """

    def __init__(self, schedule: ScheduleConfig, ahead: int = 0):
        self._schedule, self._ahead = schedule, ahead
        self.known = (0, 0.0)
        """The last step with a known start time on rank 0's clock, and that time."""
        self._step_seconds = 0.0
        self._ended = 0.0
        self.settling = True
        """True until the first two steps of this execution are over. The first step includes one-time work, so there is
        no representative duration yet, and no step is enqueued ahead."""
        self._recent: deque[tuple[float, int]] = deque(maxlen=32)
        """Seconds and layers of steps."""

    def sync(self, step: int, seconds: float) -> None:
        """Set rank 0's clock at the start of `step` to `seconds`. Every rank must call it."""
        known, before = self.known
        if step > known:
            self._step_seconds = (seconds - before) / (step - known)
        self.known = (step, seconds)

    def seconds_at(self, step: int) -> float:
        """Rank 0's clock at the start of `step`, known or extrapolated. It is the same on every rank."""
        known, seconds = self.known
        return seconds + (step - known) * self._step_seconds

    def start(self, seconds: float) -> None:
        """Called when training begins or continues, at `seconds` of this rank's clock."""
        self._ended = seconds

    def step_over(self, seconds: float, layers: int = 1) -> float:
        """Called when a step of so many layers is known to be over, at `seconds` of this rank's clock. Returns its
        duration."""
        duration, self._ended = seconds - self._ended, seconds
        if self.settling and len(self._recent) == 1:
            self._recent.clear()
            self.settling = False
        self._recent.append((duration, layers))
        return duration

    @property
    def taken(self) -> int:
        """Number of recent durations, at most 32. The duration of the first step is dropped when the second step is
        over."""
        return len(self._recent)

    def allowance(self, layers: int = 1) -> float:
        """Seconds that a step of so many layers is given: as many as the slowest recent one took, but at most twice the
        median. Before a loop begins, its steps are expected to take longer by the layers that it adds (published: 1.375
        times as long with 1.364 times the layers, 1.46 with 1.545).

        The limit is for a single stall: one step of 4.1 s among steps of 0.75 s ended a run of 60 s at 52.5 s, with the
        learning rate at 0.345 of its base. Its price: the cap is crossed if the last step itself is such a stall. The
        loop then abandons the step at its next microbatch."""
        each = sorted(seconds / count for seconds, count in self._recent)
        return layers * min(each[-1], 2 * each[len(each) // 2]) if each else 0.0

    @property
    def mean(self) -> float:
        """Mean duration of the recent steps in seconds."""
        return sum(seconds for seconds, _ in self._recent) / len(self._recent)

    def crosses_cap(self, begun: float, layers: int = 1) -> bool:
        """Whether a step after those already enqueued, which has so many layers, could end after the cap. The current
        one began at `begun` seconds."""
        seconds = 0.0 if self.settling else self.allowance(layers)
        return crosses_cap(begun, seconds * (1 + self._ahead), self._schedule)
