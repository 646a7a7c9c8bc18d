"""The phase ledger: where the seconds of a run went, and which of them count against the budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

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
