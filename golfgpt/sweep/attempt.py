"""`golfgpt try`: one change at a fixed budget against the incumbent, kept or discarded.

    runs/NAME/  incumbent.json  results.tsv  DIGEST-sSEED/ DIGEST-sSEED.log ...

A run's folder is named by a digest of its config and by its seed, so the incumbent's runs are trained once, and those
of a kept change are the incumbent's next time. Looks, seeds and budget are fixed by the first try in a folder: a change
that was discarded gets the same runs and the same decision again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import filelock

from golfgpt.config import RunConfig, to_dict
from golfgpt.errors import InputError
from golfgpt.files import from_json, read_json, write_json
from golfgpt.runs import stored
from golfgpt.sweep.children import Children
from golfgpt.sweep.decide import ALPHA, Decision, decide
from golfgpt.sweep.space import changes, flags, with_seed

VERSION = 1
COLUMNS = ("date", "decision", "change", "mean", "low", "high", "confidence", "seeds", "incumbent_bpb", "change_bpb",
           "incumbent_steps", "change_steps", "incumbent", "candidate", "note")  # fmt: skip


BUDGET = ("schedule.max_steps", "schedule.max_seconds")
"""The fields that incumbent and change share."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What all tries in a folder share."""

    recipe: str
    config: RunConfig
    """Of the incumbent, at the budget."""
    looks: tuple[int, ...]

    def save(self, folder: Path) -> None:
        values = {"version": VERSION, "recipe": self.recipe, "looks": self.looks, "config": to_dict(self.config)}
        write_json(folder / "incumbent.json", values)


def read_loop(folder: Path) -> Loop | None:
    """The loop in `folder`, or None if there is none. Raises InputError for one of another version or damaged."""
    file = folder / "incumbent.json"
    if not file.is_file():
        return None
    try:
        values = read_json(file, dict)
        if (version := values.pop("version", None)) != VERSION:
            raise ValueError(f"it has version {version!r}, expected {VERSION}")
        if isinstance(config := values.get("config"), dict):
            values["config"] = to_dict(stored(config))
        return from_json(Loop, values)
    except ValueError as error:
        raise InputError(f"{file}: {error}; choose another --name") from error


@dataclass(frozen=True, kw_only=True)
class Result:
    """A line of results.tsv."""

    decision: Literal["keep", "discard", "failed"]
    change: str
    test: Decision | None
    """None if a run of the change had no score."""
    scores: tuple[list[float], list[float]]
    """Bits per byte of incumbent and change by seed."""
    steps: tuple[list[int], list[int]]
    runs: tuple[str, str]
    """Folders of the runs, without the seed."""
    note: str = ""
    label: str = "val_bpb"
    """What the scores are of."""


def tried(loop: Loop, changed: RunConfig) -> dict[str, Any]:
    """The fields that a change sets. Raises InputError if there are none, and for those that a try fixes."""
    change = changes(loop.config, changed)
    if not change:
        raise InputError("the change changes nothing; expected an option with another value than the incumbent's")
    if "seed" in change:
        raise InputError("the change sets seed; a try chooses the seeds, the same for incumbent and change")
    if longer := [name for name in BUDGET if name in change]:
        raise InputError(
            f"the change sets {longer[0]}, the budget of every run, which the first try fixed (--steps or --budget); "
            "leave it out, or begin with another budget under another --name"
        )
    return change


def attempt(folder: Path, loop: Loop, changed: RunConfig, children: Children, say: Callable[[str], None]) -> Result:
    """Train incumbent and change with the seeds of each look until one decides. Appends a line to results.tsv. Stores
    the loop after the first run of its incumbent, and the change as the incumbent if it is kept. Raises InputError for
    a change that changes no field and for an incumbent that does not train; then no line is written."""
    change, label = tried(loop, changed), "val_bpb"
    arms, scores, steps, test, note = (loop.config, changed), ([], []), ([], []), None, ""
    runs = tuple(str(folder / digest(config)) for config in arms)
    decision = "discard"
    say(f"the first decision is after {2 * loop.looks[0]} runs; each has a log, {folder}/*.log")
    with children.forwarding():
        for index in range(loop.looks[-1]):
            for arm, config in enumerate(arms):
                seeded = with_seed(config, index)
                path = Path(f"{runs[arm]}-s{seeded.seed}")
                outcome = children.train(path, loop.recipe, seeded)
                children.check()
                if outcome.code or outcome.score is None:
                    what = (
                        f"exit code {outcome.code} at seed {seeded.seed}: {outcome.message or 'over the byte budget'}"
                    )
                    if arm == 0:
                        raise InputError(f"the incumbent {path} failed: {what} ({path}.log)")
                    note = f"{what} ({path}.log)"
                    break
                if not (folder / "incumbent.json").exists():  # one that does not train can be replaced
                    loop.save(folder)
                scores[arm].append(outcome.score)
                label = outcome.label
                steps[arm].append(outcome.result["steps"])
                say(f"{'change' if arm else 'incumbent'} seed {seeded.seed}: {label} {outcome.score:.4f}  {path}")
            if note:
                decision = "failed" if outcome.score is None and not outcome.diverged else "discard"
                break
            if index + 1 in loop.looks:
                test = decide([a - b for a, b in zip(*scores, strict=True)], loop.looks)
                say(f"look at {test.seeds} seeds: {interval(test)}: {test.verdict}")
                if test.verdict != "continue":
                    decision = test.verdict
                    break
    text = shlex.join(flags(change))
    result = Result(
        decision=decision, change=text, test=test, scores=scores, steps=steps, runs=runs, note=note, label=label
    )
    return _record(folder, loop, changed, result)


def _record(folder: Path, loop: Loop, changed: RunConfig, result: Result) -> Result:
    with filelock.FileLock(folder / ".lock"):
        if result.decision == "keep":
            if read_loop(folder) != loop:
                result = replace(result, note="not the incumbent: another change was kept meanwhile; try it again")
            else:
                replace(loop, config=changed).save(folder)
        file = folder / "results.tsv"
        with open(file, "a", encoding="utf-8") as out:
            if not file.stat().st_size:
                out.write("\t".join(COLUMNS) + "\n")
            out.write("\t".join(line(result)) + "\n")
            out.flush()
            os.fsync(out.fileno())
    return result


def line(result: Result) -> list[str]:
    """The fields of COLUMNS."""
    test = result.test
    numbers = [f"{x:+.5f}" for x in (test.mean, test.low, test.high)] if test else [""] * 3
    confidence = [f"{test.confidence:.4f}"] if test else [""]
    means = [f"{statistics.fmean(s):.5f}" if s else "" for s in result.scores]
    steps = [f"{statistics.fmean(s):.0f}" if s else "" for s in result.steps]
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    seeds = str(test.seeds if test else len(result.scores[1]))
    out = [
        date,
        result.decision,
        result.change,
        *numbers,
        *confidence,
        seeds,
        *means,
        *steps,
        *result.runs,
        "; ".join(filter(None, (result.note, result.label if result.label != "val_bpb" else ""))),
    ]
    return [" ".join(cell.split()) for cell in out]


def digest(config: RunConfig) -> str:
    """Names a config without its seed, and without eval.compile, which changes scores by rounding only."""
    tree = to_dict(replace(config, seed=0))
    del tree["eval"]["compile"]
    values = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:10]


def interval(test: Decision) -> str:
    return f"gain {test.mean:+.4f} bits per byte, interval {test.low:+.4f} to {test.high:+.4f}"


def summary(result: Result) -> str:
    """The decision in words."""
    if result.test is None or (result.note and result.decision != "keep"):
        return f"{result.decision}: {result.note}"
    test = result.test
    sure = "over 99.9%" if test.confidence > 0.999 else f"{test.confidence:.1%}"
    text = f"{result.decision}: {result.change}: {interval(test)} ({test.seeds} seeds); better with confidence {sure}"
    if result.decision == "discard":
        text += f", and {1 - ALPHA:.0%} at its looks was needed"
    if result.label != "val_bpb":
        text += f"\nthe scores are {result.label}"
    return f"{text}\n{result.note}" if result.note else text


def as_json(result: Result) -> dict[str, Any]:
    (incumbent, change), (incumbent_steps, change_steps) = result.scores, result.steps
    return {
        "decision": result.decision,
        "change": result.change,
        "test": result.test and asdict(result.test),
        "incumbent": {"runs": result.runs[0], "scores": incumbent, "steps": incumbent_steps},
        "candidate": {"runs": result.runs[1], "scores": change, "steps": change_steps},
        "score": result.label,
        "note": result.note,
    }
