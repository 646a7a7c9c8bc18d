"""Child processes that try out what may crash or hang, so that the run's own process does not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

TRANSIENT = ("no result in time", "ended by", "exit code", "OutOfMemory", "are over", "do not repay")
"""What a verdict says that another try need not say."""


def settled(verdict: str | None) -> bool:
    """Whether `verdict` may be kept for later runs."""
    return not any(sign in (verdict or "") for sign in TRANSIENT)


def verdicts(commands: Mapping[str, Sequence[str]], seconds: float) -> dict[str, str | None]:
    """Run all `commands` at once, for `seconds` at most. Of each, by name, why it failed, or None.

    A command prints a JSON object as its last line, name -> why it is wrong or null. A command that does not, that ends
    by a signal or that does not end in time has failed, too."""
    # They import from where this process does, which need not be the working directory (Python 3.11 and newer).
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.ExitStack() as stack:
        children = {}
        for name, command in commands.items():
            out, errors = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=env)
            stack.callback(child.wait)
            stack.callback(child.kill)
            children[name] = child, out, errors
        stop = time.monotonic() + seconds
        return {name: _verdict(*each, stop) or None for name, each in children.items()}


def _verdict(child: subprocess.Popen, out: TextIO, errors: TextIO, stop: float) -> str:
    try:
        code = child.wait(max(0.0, stop - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "no result in time"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = {file: (file.seek(0), file.read().strip().splitlines())[1] or ["no output"] for file in (out, errors)}
    try:
        return "; ".join(f"{name}: {why}" for name, why in json.loads(lines[out][-1]).items() if why)
    except (ValueError, AttributeError):
        return f"exit code {code}: {lines[errors][-1][:200]}"
