"""What a run says: lines for people, lines in the published scripts' format, a live status, metrics."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from functools import partial
from typing import Any

from golfgpt.config import RunConfig
from golfgpt.train.run_folder import RunFolder
from golfgpt.train.trackers import Tracking


class Reporter:
    """Prints what people read (`show`), logs what scripts read (`log`: train.log, in the published scripts' format), or
    both (`line`); writes numbers to metrics.jsonl and a tracker.

    On a terminal, a live status line is shown below the printed lines. Elsewhere there are only plain lines, and a
    thread prints the newest status if nothing was printed for 5 seconds, after that for 30 seconds, because set-up and
    export can take longer. With `quiet` (--json), lines go to standard error. Ranks other than 0 have `folder=None` and
    print nothing. `close` also closes the folder.
    """

    def __init__(self, folder: RunFolder | None, *, speak: bool = True, quiet: bool = False):
        self.folder, self._speak = folder, speak
        self._told, self._patience, self._newest = time.monotonic(), 5.0, ""
        self._file = sys.stderr if quiet else sys.stdout
        self._status = self._tracking = self._breaker = None
        self._closed = threading.Event()
        if speak and not self._file.isatty():
            self._breaker = threading.Thread(target=self._break_silences, daemon=True)
            self._breaker.start()
        elif speak:
            from rich.console import Console
            from rich.text import Text

            self._one_line = partial(Text, no_wrap=True, overflow="ellipsis")
            self._status = Console(file=self._file, highlight=False).status("", spinner="dots")
            self._status.start()

    def line(self, text: str) -> None:
        """Print a line, also to train.log."""
        self.show(text)
        self.log(text)

    def log(self, text: str) -> None:
        """Write a line to train.log only."""
        if self.folder:
            self.folder.log(text)

    def show(self, text: str) -> None:
        """Print a line."""
        if not self._speak:
            return
        self._told, self._patience, self._newest = time.monotonic(), 5.0, ""
        if self._status:
            self._status.console.print(text, markup=False)
        else:
            self._print(text)

    def status(self, text: str) -> None:
        """Say what goes on now: on the live line, cut to the width of the terminal, or after a silence."""
        self._newest = text
        if self._status:
            self._status.update(self._one_line(text))

    def _break_silences(self) -> None:
        while not self._closed.wait(0.5):
            text, now = self._newest, time.monotonic()
            if text and now - self._told >= self._patience:
                self._told, self._patience = now, 30.0
                if self._newest is text:  # not a newer one
                    self._newest = ""
                with contextlib.suppress(ValueError):  # such as a closed file
                    self._print(text)

    def _print(self, text: str) -> None:
        """A disk that is full or a reader that is gone silences a run, which goes on: train.log has its lines too."""
        try:
            self._file.write(f"{text}\n")  # at once, because two threads write
            self._file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())

    def track(self, config: RunConfig) -> None:
        """Start the tracker of `config`, to which metrics go from here on."""
        if self.folder:
            self._tracking = Tracking(config, self.folder.path, self.line)

    def metric(self, kind: str, *, tracked: bool = True, **values: Any) -> None:
        """Append to metrics.jsonl, and log to the tracker unless it is not `tracked`."""
        if self.folder:
            self.folder.metric(kind, **values)
        if self._tracking and tracked:
            self._tracking.metric(kind, values)

    def close(self) -> None:
        self._closed.set()
        if self._breaker:
            self._breaker.join(5.0)
        if self._tracking:
            self._tracking.finish(None)
        if self._status:
            self._status.stop()
        if self.folder:
            self.folder.close()
