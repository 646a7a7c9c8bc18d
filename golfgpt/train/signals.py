"""SIGTERM and SIGINT end a run. The state is saved, and a message tells how to continue."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from golfgpt.errors import Interrupted
from golfgpt.runs import resume_hint


class Signals:
    """Handles SIGTERM and SIGINT: raises Interrupted immediately, or, while `deferred`, at the end of the step.

    A second signal of the same kind raises it immediately. Outside the main thread, no handlers are installed.
    """

    def __init__(self, path: Path):
        self.caught: list[int] = []
        self.deferred = False
        self.saved = "nothing was saved yet"
        self.then = "the run ends after this step"
        self._path = path

    def __enter__(self) -> Signals:
        main = threading.current_thread() is threading.main_thread()
        kinds = (signal.SIGTERM, signal.SIGINT) if main else ()
        self._previous = {kind: signal.signal(kind, self._handle) for kind in kinds}
        return self

    def __exit__(self, *error) -> None:
        for kind, previous in self._previous.items():
            signal.signal(kind, previous)

    def _handle(self, signum: int, frame) -> None:
        self.caught.append(signum)
        if not self.deferred or self.caught.count(signum) > 1:
            raise self.interrupted()
        if int(os.environ.get("RANK", 0)) == 0:
            name = signal.Signals(signum).name
            clear = "\r\x1b[2K" if os.isatty(2) else ""  # ^C and the live line, which is drawn again below
            with contextlib.suppress(OSError):  # ctrl-C may have ended the reader first
                os.write(2, f"{clear}{name}: {self.then}; another {name} ends it now\n".encode())

    def release(self) -> None:
        """Stop deferring. Raises Interrupted if a signal came after the votes of the last step."""
        self.deferred = False
        self.raise_caught()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Do not defer signals in the block. The state must be saved before; the block may take long."""
        self.release()
        try:
            yield
        finally:
            self.deferred = True

    @contextlib.contextmanager
    def deferring(self, then: str) -> Iterator[Callable[[], None]]:
        """Defer signals in the block, telling what happens `then`; gives what raises Interrupted after one. Nothing
        does at the end of the block: what it made is whole."""
        before, self.deferred, self.then = self.then, True, then
        try:
            yield self.raise_caught
        finally:
            self.deferred, self.then = False, before

    def raise_caught(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.caught:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """The exception that ends the run. Its message tells what is saved and how to continue."""
        signum = self.caught[0] if self.caught else signal.SIGTERM
        return Interrupted(f"stopped by {signal.Signals(signum).name}; {self.saved}.{resume_hint(self._path)}", signum)
