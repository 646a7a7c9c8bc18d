"""Runs as child processes: `golfgpt train`, one process a run, so that a crash of one ends nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from golfgpt.config import RunConfig
from golfgpt.errors import BudgetError, Interrupted, NonFiniteError
from golfgpt.recipes import get
from golfgpt.runs import RUNS, Run, read_run
from golfgpt.sweep.space import changes, flags

POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. `result` is its result.json, or None without a score."""

    code: int
    result: dict[str, Any] | None
    message: str
    """The last line that the process wrote."""
    wall: float | None = None
    """Seconds of the whole process, start and imports included; None: earlier processes did part of the work."""

    @property
    def diverged(self) -> bool:
        return self.code == NonFiniteError.exit_code

    @property
    def score(self) -> float | None:
        """Bits per byte, with test-time training if the run has it; None if it failed."""
        if self.result is None or self.code not in (0, BudgetError.exit_code):
            return None
        return (self.result["adapted"] or self.result["score"])["val_bpb"]

    @property
    def label(self) -> str:
        """What the score is of, such as val_bpb (first 4,000 tokens)."""
        return (self.result["adapted"] or self.result["score"]).get("label", "val_bpb")


class Children:
    """The runs of this process. SIGINT and SIGTERM stop them with their states saved."""

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads
        """CPU threads of runs whose config has runtime.threads 0; 0: torch's default."""
        self.signum = 0
        """The signal that ends them all; 0: none."""
        self._running: set[subprocess.Popen] = set()

    @contextmanager
    def forwarding(self, left: str = "the runs are saved. The same command continues.") -> Iterator[None]:
        """Pass SIGINT and SIGTERM on to the children in the block; then it raises Interrupted, which says what is
        `left`. Only in the main thread, which Python gives the signals to."""

        def stop(signum: int, frame: Any) -> None:
            self.signum = signum
            for child in list(self._running):
                child.send_signal(signum)

        kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {kind: signal.signal(kind, stop) for kind in kinds}
        try:
            yield
        except Interrupted:  # from `check`
            pass
        finally:
            for kind, handler in previous.items():
                signal.signal(kind, handler)
        if self.signum:
            name = signal.Signals(self.signum).name
            raise Interrupted(f"stopped by {name}; {left}", self.signum)

    def check(self) -> None:
        """Raises Interrupted if all are to end."""
        if self.signum:
            raise Interrupted("stopped", self.signum)

    def train(self, path: Path, recipe: str, config: RunConfig, give_up: Callable[[], bool] = bool) -> Outcome | None:
        """Train the run in `path`, a folder under runs/, or what is left of it. None: `give_up` said so, and the run is
        saved. Raises Interrupted if all are to end.

        A run that an earlier process left is waited for: it may still be training when a sweep was killed.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._waiting_for(path.parent / f".{path.name}.lock"):  # which another process of golfgpt try may hold
            if path.exists():
                with self._waiting_for(path / ".lock"):
                    pass
            return finished(path) or self._start(path, recipe, config, give_up)

    @contextmanager
    def _waiting_for(self, file: Path) -> Iterator[None]:
        """Hold a lock in the block. Raises Interrupted if all are to end."""
        lock = filelock.FileLock(file, timeout=POLL_SECONDS)
        while not lock.is_locked:
            self.check()
            with suppress(filelock.Timeout):
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _start(self, path: Path, recipe: str, config: RunConfig, give_up: Callable[[], bool]) -> Outcome | None:
        if not config.runtime.threads:
            config = replace(config, runtime=replace(config.runtime, threads=self.threads))
        resume = (path / "config.json").exists()
        options = ["train", "--resume", str(path)] if resume else train_options(path, recipe, config)
        log, begun, gave_up = path.parent / f"{path.name}.log", time.monotonic(), False
        with open(log, "ab") as out:
            # In a session of its own: a terminal's ^C reaches it through `forwarding` only, once.
            child = subprocess.Popen(
                [sys.executable, "-m", "golfgpt", *options],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._running.add(child)
        try:
            if self.signum:  # it came before the child was in the set
                child.send_signal(self.signum)
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
                if not gave_up and give_up():
                    gave_up = True
                    child.terminate()
        finally:
            child.terminate()
            child.wait()
            self._running.discard(child)
        result = read_run(path).result if (path / "config.json").exists() else None
        if child.returncode not in (0, BudgetError.exit_code, NonFiniteError.exit_code):
            self.check()
            if gave_up:
                return None
        wall = None if resume else time.monotonic() - begun
        return Outcome(code=child.returncode, result=result, message=_last_line(log), wall=wall)


def train_options(path: Path, recipe: str, config: RunConfig) -> list[str]:
    """The arguments of golfgpt that train `config` in `path`."""
    name = path.relative_to(RUNS).as_posix()
    return ["train", "--recipe", recipe, "--name", name, *flags(changes(get(recipe).config, config))]


def finished(path: Path) -> Outcome | None:
    """The outcome of a run that has all of its scores, else None."""
    if not (path / "config.json").exists():
        return None
    run: Run = read_run(path)
    if run.result is None or not run.metrics("result"):
        return None
    over = run.result["margin_bytes"] < 0
    return Outcome(code=BudgetError.exit_code if over else 0, result=run.result, message="")


def share_of_threads(jobs: int) -> int:
    """CPU threads of each of `jobs` runs at once."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // jobs)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("golfgpt: ") if lines else "no output"
