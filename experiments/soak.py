"""Measures whether memory, file handles, threads and the cost of a step stay constant in a long training run.

    python -m experiments.soak --data DIR --out DIR [--hours 2]
    python -m experiments.soak --out DIR --table

Trains the recipe `demo` on one thread at the lowest priority, with checkpoints every minute and a validation with a
probe every 500 steps. Every ten seconds a line goes to OUT/soak.jsonl, and after HOURS the run gets SIGTERM. `--table`
reads the lines at any time.

A step costs CPU seconds (user and system) here, because its wall time depends on what else the machine does. Intervals
with a checkpoint or a validation do not count for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bench.experiment_report import markdown

SAMPLES, EVERY = "soak.jsonl", 10.0
"""File of the lines, and seconds between them."""
SETTLED, BLOCK = 600.0, 300.0
"""Seconds after which a slope begins, and seconds that count as one observation in it: samples within five minutes
are not independent, since checkpoints and validations come and go in that time."""
OPTIONS = (
    *("--recipe", "demo", "--schedule.max-seconds", "None", "--schedule.max-steps", "10000000"),
    *("--runtime.threads", "1", "--runtime.dtype", "float32", "--runtime.compile", "off"),
    *("--runtime.checkpoint-seconds", "60", "--runtime.val-every", "500", "--runtime.probe"),
    *("--eval.max-tokens", "16384"),
)


def sample(pid: int) -> dict[str, float]:
    """What /proc says about a process: bytes, counts and CPU seconds."""
    proc = Path("/proc") / str(pid)
    rollup = dict(line.split(":") for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
    kinds = {"rss": "Rss", "pss": "Pss", "anonymous": "Anonymous"}
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    return {name: 1024 * int(rollup[kind].split()[0]) for name, kind in kinds.items()} | {
        "handles": len(os.listdir(proc / "fd")),
        "threads": int(fields[17]),
        "cpu": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
    }


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines after those read before; the last one may still be being written."""
    for line in iter(file.readline, b""):
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield line


def watch(data: Path, out: Path, hours: float) -> int:
    """Train and write the lines. Returns the exit status of the run, which is 143 if it ended by our SIGTERM."""
    os.nice(19)
    command = [sys.executable, "-m", "golfgpt", "train", "--name", "soak", "--data.path", str(data.resolve()), *OPTIONS]
    with open(out / "train.out", "ab") as log, open(out / SAMPLES, "a", buffering=1) as lines:
        run = subprocess.Popen(command, cwd=out, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        begun, step, events, metrics = time.monotonic(), 0, 0, None
        while run.poll() is None:
            if metrics is None and (file := out / "runs/soak/metrics.jsonl").exists():
                metrics = open(file, "rb")  # noqa: SIM115
            for line in whole_lines(metrics) if metrics else ():
                kind = json.loads(line)
                step, events = kind.get("step", step), events + (kind["kind"] not in ("train", "settings"))
            try:
                line = {"t": round(time.monotonic() - begun, 2), "step": step, "events": events} | sample(run.pid)
                lines.write(json.dumps(line) + "\n")
            except (FileNotFoundError, ProcessLookupError):  # it ended just now
                break
            if time.monotonic() - begun > 3600 * hours:
                run.send_signal(signal.SIGTERM)
                break
            time.sleep(EVERY)
        return run.wait()


class Slope(NamedTuple):
    """A straight line through observations, per hour, and the standard error of its slope."""

    mean: float
    per_hour: float
    error: float


def slope(points: Sequence[tuple[float, float]]) -> Slope:
    """Through the means over blocks of `points` (seconds, value)."""
    blocks: dict[int, list[float]] = {}
    for t, value in points:
        blocks.setdefault(int(t // BLOCK), []).append(value)
    x = [(number + 0.5) * BLOCK / 3600 for number in blocks]
    y = [statistics.mean(values) for values in blocks.values()]
    if len(x) < 3:
        raise SystemExit(f"{len(x)} blocks of {BLOCK:g} s after {SETTLED:g} s; a slope needs 3: wait")
    per_hour, begin = statistics.linear_regression(x, y)
    spread = sum((a - statistics.mean(x)) ** 2 for a in x)
    left = sum((b - begin - per_hour * a) ** 2 for a, b in zip(x, y, strict=True))
    return Slope(statistics.mean(y), per_hour, math.sqrt(left / (len(x) - 2) / spread))


def step_costs(samples: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """(seconds, CPU seconds a step) of the intervals between samples without a checkpoint or a validation. These are
    counted when they are over, so an interval before a counted one may hold the beginning."""
    triples = zip(samples, samples[1:], samples[2:], strict=False)
    return [
        (b["t"], (b["cpu"] - a["cpu"]) / (b["step"] - a["step"]))
        for a, b, c in triples
        if a["events"] == c["events"] and b["step"] > a["step"]
    ]


def table(samples: Sequence[Mapping[str, float]]) -> str:
    samples = [line for line in samples if line["t"] >= SETTLED]

    def values(name: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(line["t"], line[name] * scale) for line in samples]

    rows: list[tuple[str, list[tuple[float, float]], Callable[[float], str]]] = [
        ("private memory, MB", values("anonymous", 1e-6), "{:.2f}".format),
        ("resident memory, MB", values("rss", 1e-6), "{:.2f}".format),
        ("proportional memory, MB", values("pss", 1e-6), "{:.2f}".format),
        ("file handles", values("handles"), "{:.2f}".format),
        ("threads", values("threads"), "{:.2f}".format),
        ("CPU ms a step", [(t, 1000 * cost) for t, cost in step_costs(samples)], "{:.2f}".format),
    ]
    out = []
    for name, points, text in rows:
        found, quarter = slope(points), max(len(points) // 4, 1)
        early, late = (statistics.mean(v for _, v in part) for part in (points[:quarter], points[-quarter:]))
        out.append((name, text(found.mean), text(early), text(late), f"{found.per_hour:+.3f} ± {found.error:.3f}"))
    hours = (samples[-1]["t"] - samples[0]["t"]) / 3600
    steps = samples[-1]["step"]
    head = ("", "mean", "first quarter", "last quarter", "slope an hour ± standard error")
    return f"{hours:.2f} hours after the first {SETTLED / 60:.0f} minutes; {steps:,.0f} steps\n\n{markdown(head, out)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="prepared folder, vocabulary 1024")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the run and of {SAMPLES}")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--table", action="store_true", help="only read the lines")
    args = parser.parse_args(argv)
    if args.table:
        print(table([json.loads(line) for line in (args.out / SAMPLES).read_text().splitlines()]))
        return
    if args.data is None:
        parser.error("--data names the prepared folder")
    args.out.mkdir(parents=True, exist_ok=True)
    raise SystemExit(watch(args.data, args.out, args.hours))


if __name__ == "__main__":
    main()
