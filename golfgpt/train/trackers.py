"""Trackers also get the numbers of metrics.jsonl. Each is three methods around a library, imported when it starts:

    start(config)         before training; `config` is the nested config of the run
    log(step, values)     names such as train/loss -> numbers: steps that the log shows, validations, checkpoints
    finish(result)        result.json, or None if the run ends without a score

By default they write below the run folder and need no network. Only rank 0 has one. metrics.jsonl stays the record: a
tracker that raises is switched off with a warning, and the run goes on. A tracker that hangs is not detected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from golfgpt.config import RunConfig, to_dict
from golfgpt.errors import InputError, interruption, missing_package
from golfgpt.runs import flatten

PROJECT = "golfgpt"


class Tracker(Protocol):
    """Made with the run folder."""

    def start(self, config: dict[str, Any]) -> None: ...
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def finish(self, result: dict[str, Any] | None) -> None: ...


class Wandb:
    """Weights & Biases, in wandb/ of the run; `wandb sync` uploads it. WANDB_MODE=online sends it at once."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, config: dict[str, Any]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        settings = wandb.Settings(silent=True, console="off")  # train.log has the lines, and the terminal is ours
        self.run = wandb.init(
            project=PROJECT, name=self.folder.name, dir=self.folder, config=config, mode=mode, settings=settings
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self, result: dict[str, Any] | None) -> None:
        self.run.summary.update(numbers(result or {}))
        self.run.finish()


class Trackio:
    """trackio, in trackio/ of the run unless TRACKIO_DIR is set."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, config: dict[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(self.folder.resolve() / "trackio"))  # read when it is imported
        import trackio

        self.trackio = trackio
        self.run = trackio.init(project=PROJECT, name=self.folder.name, config=config, resume="allow", embed=False)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self, result: dict[str, Any] | None) -> None:
        if result:
            self.run.log({f"result/{name}": value for name, value in numbers(result).items()}, step=result["steps"])
        self.trackio.finish()


class TensorBoard:
    """Event files in tensorboard/ of the run: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, result: dict[str, Any] | None) -> None:
        for name, value in numbers(result or {}).items():
            self.writer.add_scalar(f"result/{name}", value, result["steps"])
        self.writer.close()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}


def require_tracker(name: str) -> None:
    """Raises InputError that names the extra if the package of runtime.tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        error = ModuleNotFoundError(name=name)
        raise InputError(f"runtime.tracker {name}: {missing_package(error)}, or drop --runtime.tracker")


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers in nested `values`, by their dotted names."""
    return {name: value for name, value in flatten(values).items() if type(value) in (int, float)}


class Tracking:
    """The tracker of a run, or none: it ends at its first failure, with one warning."""

    def __init__(self, config: RunConfig, folder: Path, warn: Callable[[str], None]):
        self._name, self._warn = config.runtime.tracker, warn
        self._tracker = TRACKERS[self._name](folder) if self._name in TRACKERS else None
        self._do("start", to_dict(config))

    def metric(self, kind: str, values: dict[str, Any]) -> None:
        """One object of metrics.jsonl."""
        if kind == "result":
            self.finish(values)
        elif "step" in values:
            shown = {f"{kind}/{name}": v for name, v in numbers(values).items() if name != "step" and "." not in name}
            self._do("log", values["step"], shown)

    def finish(self, result: dict[str, Any] | None) -> None:
        self._do("finish", result)
        self._tracker = None

    def _do(self, method: str, *args: Any) -> None:
        if self._tracker is None:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is the run's
                getattr(self._tracker, method)(*args)
        except Exception as error:
            if stopped := interruption(error):  # a signal came while the tracker worked
                raise stopped from error
            self._tracker = None
            self._warn(
                f"warning: runtime.tracker {self._name} failed in {method} ({type(error).__name__}: {error}); the run "
                "continues without it, and metrics.jsonl has everything"
            )
