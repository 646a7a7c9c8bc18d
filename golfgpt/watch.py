"""`golfgpt watch`: a run as another process trains it, from the lines that it adds to metrics.jsonl. No torch."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from golfgpt.config import RunConfig
from golfgpt.runs import as_written, going_on, locked, metric, read_config, read_stored_result
from golfgpt.train.status import seconds_left, status

RECENT = 32
"""Steps whose mean duration is shown, as many as in the live line of the run."""


@dataclass
class State:
    """What the lines read so far add up to."""

    train: dict[str, Any] | None = None
    """The last line of each kind."""
    val: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    """Why the run stopped; None while it goes on."""
    earlier: bool = False
    """Whether `result` is of an execution before the last one, which ended without."""
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind in ("train", "val", "checkpoint", "result", "end"):
            setattr(self, kind, line)
        if kind == "resume":
            self.end, self.result, self.earlier = None, None, False
        if kind == "train" and "step_seconds" in line:
            if line["step"] == 2:
                self.durations.clear()  # the first step has one-time work
            self.durations.append(line["step_seconds"])

    @property
    def over(self) -> bool:
        return bool(self.result or self.end)

    @property
    def mean(self) -> float:
        """Mean duration of the recent steps in seconds."""
        if self.durations:
            return sum(self.durations) / len(self.durations)
        return self.train["train_seconds"] / self.train["step"]  # of a run whose metrics lack durations

    def _left(self, config: RunConfig) -> float | None:
        if self.over or not self.train:
            return 0.0 if self.over else None
        return seconds_left(config, self.train["step"], self.train["train_seconds"], self.mean)

    def facts(self, config: RunConfig) -> dict[str, Any]:
        """The state as plain values, for --json; None for what is not known yet."""
        last, val, result = self.train or {}, self.val or {}, self.result or {}
        mean = self.mean if last else None
        return {
            "step": last.get("step"),
            "max_steps": config.schedule.max_steps,
            "loss": last.get("loss"),
            "loss_ema": last.get("loss_ema"),
            "bpb_ema": last.get("bpb_ema"),
            "lr_multiplier": last.get("lr_multiplier"),
            "grad_norm": last.get("grad_norm"),
            "train_seconds": last.get("train_seconds"),
            "step_ms": mean and 1000 * mean,
            "tokens_per_second": mean and config.data.batch_tokens / mean,
            "seconds_left": self._left(config),
            "forecast_bytes": (self.checkpoint or {}).get("projected_artifact_bytes"),
            "val_step": val.get("step"),
            "val_bpb": val.get("val_bpb"),
            "score_bpb": (result.get("score") or {}).get("val_bpb"),
            "score_label": (result.get("score") or {}).get("label"),
            "total_bytes": result.get("total_bytes"),
            "ended": self.end["reason"] if self.end and not self.earlier else "finished" if self.result else None,
        }

    def line(self, config: RunConfig) -> str:
        """The state in one line: that of the run itself, the last loss, forecast, validation, and how it ended."""
        if not self.train:
            words = ["no step yet" if self.over else "no step yet: the run is being set up"]
        else:
            row = self.train
            words = [status(config, row, self.mean, ended=self.over), f"last loss {row['loss']:.4f}"]
        if self.checkpoint and self.checkpoint["projected_artifact_bytes"] and not self.result:
            words.append(f"model.golf about {self.checkpoint['projected_artifact_bytes']:,} bytes")
        if self.val:
            words.append(f"val_bpb {self.val['val_bpb']:.4f} at step {self.val['step']}")
        if self.result:
            score = self.result["score"]
            words.append(
                f"finished: {score['label']} {score['val_bpb']:.4f}, {self.result['total_bytes']:,} bytes in all"
            )
        if self.end:
            words.append(f"{'a later resume ' if self.earlier else ''}ended: {self.end['reason']}")
        return "  ".join(words)


class Lines:
    """The whole lines that a file gains."""

    def __init__(self, file: Path):
        self.file, self._read = file, 0

    def new(self) -> Iterator[dict[str, Any]]:
        if not self.file.is_file():
            return
        with open(self.file, "rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        yield from filter(None, map(metric, whole.splitlines()))


def watch(
    run: Path,
    *,
    once: bool,
    out: TextIO = sys.stdout,
    every: float = 1.0,
    quiet: float = 10.0,
    silence: float = 30.0,
) -> dict[str, Any]:
    """Show the state of `run` until it ends, every `every` seconds on a terminal, elsewhere as lines at least `quiet`
    seconds apart. With `once`, show it and return. A killed run says nothing: after `silence` seconds without a line,
    with `once` at once, it has ended if no process holds the folder. A run with a result is finished, whatever came of
    a later resume, as `golfgpt runs` has it. Returns the last `State.facts`. Raises InputError if there is no run.
    """
    config, lines, state = read_config(run), Lines(run / "metrics.jsonl"), State()
    from rich.console import Console
    from rich.live import Live

    console = Console(file=out, highlight=False)
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not once else None
    shown, since, heard = "", -math.inf, time.monotonic()
    if live:
        live.start()
    try:
        while True:
            with as_written(run):
                for value in lines.new():
                    state.add(value)
                    heard = time.monotonic()
            if not state.over and (once or time.monotonic() - heard >= silence) and not locked(run):
                state.end = {"reason": f"no process trains it; {going_on(run)}"}
            if state.end and not state.result:  # of scoring a finished run again, perhaps
                state.result = read_stored_result(run)
                state.earlier = state.result is not None
            config = read_config(run)  # a run writes what it chose before its first step
            last = once or state.over
            with as_written(run):
                facts, text = state.facts(config), state.line(config)
                table = live and _table(run, facts)
            if live:
                live.update(table, refresh=True)
            elif text != shown and (last or time.monotonic() - since >= quiet):
                print(text, file=out, flush=True)
                shown, since = text, time.monotonic()
            if last:
                return facts
            time.sleep(every)
    finally:
        if live:
            live.stop()


def _table(run: Path, facts: dict[str, Any]) -> Any:
    """The state for a terminal, a fact per row."""
    from rich.table import Table
    from rich.text import Text

    def show(name: str, form: str = "", unit: str = "") -> str:
        return "–" if facts[name] is None else f"{facts[name]:{form}}{unit}"

    val = "–" if facts["val_bpb"] is None else f"{show('val_bpb', '.4f')} at step {show('val_step', ',')}"
    rows = {
        "step": f"{show('step', ',')} of at most {show('max_steps', ',')}",
        "loss": f"{show('loss', '.4f')}, mean {show('loss_ema', '.4f')}",
        "bits per byte": show("bpb_ema", ".4f"),
        "learning rate": f"{show('lr_multiplier', '.3f')} of its base, gradient norm {show('grad_norm', '.2f')}",
        "step time": f"{show('step_ms', ',.1f', ' ms')}, {show('tokens_per_second', ',.0f')} tokens/s",
        "clock": f"{show('train_seconds', ',.0f', ' s')}, {show('seconds_left', ',.0f', ' s')} left",
        "forecast": show("forecast_bytes", ",", " bytes"),
        "validation": val,
    }
    if facts["score_bpb"] is not None:
        rows["score"] = f"{facts['score_label']} {show('score_bpb', '.4f')}, {show('total_bytes', ',', ' bytes')}"
    if facts["ended"]:
        rows["ended"] = facts["ended"]
    table = Table(title=Text(str(run)), show_header=False)
    for name, text in rows.items():
        table.add_row(name, Text(text))
    return table
