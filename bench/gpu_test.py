"""Run the tests that need a GPU or use one where there is one, and write each outcome at once.

    python -m bench.gpu_test [--seconds N] [--out DIR] [further options of pytest]

Those are the tests marked gpu, and those with the fixture `device`, which interpret kernels on a machine without a GPU.
Only files with such tests are collected: the others may need packages that the machine lacks. Tests run in up to 8
processes if pytest-xdist is installed.
DIR/tests-*.json: gpu, sm, torch, triton, date, command, and tests, a list of {test, outcome, seconds, why}.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from golfgpt_kernels import tuning
from golfgpt_kernels._dispatch import slug

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(config, items) -> None:
    """This file is a pytest plugin itself, for the workers of pytest-xdist, which know nothing of Journal."""
    others = [item for item in items if "gpu" not in item.keywords and "device" not in item.fixturenames]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


class Journal:
    """pytest plugin: writes every outcome, and ends the session when the time is up."""

    def __init__(self, file: Path, result: dict, seconds: float):
        self.file, self.result, self.stop = file, result, time.monotonic() + seconds

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.add(report.nodeid, "error", 0.0, report.longrepr)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":  # of setup and teardown only what went wrong
            self.add(report.nodeid, report.outcome, report.duration, report.longrepr)

    def add(self, test: str, outcome: str, seconds: float, why: object) -> None:
        row = {"test": test, "outcome": outcome, "seconds": round(seconds, 2)}
        self.result["tests"].append(row | ({"why": str(why)[-2000:]} if why else {}))
        tuning.write_json(self.file, self.result)

    def pytest_runtest_logfinish(self, nodeid) -> None:
        if time.monotonic() > self.stop:
            pytest.exit(f"the time is up after {nodeid}", returncode=3)


def gpu_files(folder: Path = ROOT / "tests") -> list[Path]:
    about = re.compile(r"mark\.gpu|def test_\w+\([^)]*\bdevice\b")
    return [file for file in sorted(folder.glob("test_*.py")) if about.search(file.read_text(encoding="utf-8"))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options, more = parser.parse_known_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "bench.gpu_test needs a CUDA device; `python -m pytest` interprets kernels without one\n")
    result = tuning.environment(torch.device("cuda", 0)) | {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m bench.gpu_test",
    }
    journal = Journal(options.out / f"tests-{slug(result)}.json", result | {"tests": []}, options.seconds)
    # Most of the time goes into Triton's compiler, on one core each.
    workers = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    options = ["-p", "bench.gpu_test", "--continue-on-collection-errors", *workers]
    return pytest.main([*options, *more, *map(str, gpu_files())], plugins=[journal])


if __name__ == "__main__":
    sys.exit(main())
