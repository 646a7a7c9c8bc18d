"""pytest bench/: each case of golfgpt_kernels in columns eager | torch.compile | golfgpt, against the measured roof.

A bench_*.py file lists its CASES and has a test of the fixtures `case`, `column` and `timed`. On a GPU the
kernel is checked before it is timed, and what was measured goes to OUT/gpu-*.json after every column (schema:
report.py). Without a GPU eager and torch.compile are timed at small shapes, which shows that the benchmark
works and no more. pytest-benchmark's own statistics are of replays, each a CUDA graph of many calls;
extra_info has us_per_call.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from golfgpt_kernels import tuning

from bench import report
from bench.roofs import roofs

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
COMMAND = "python -m pytest bench"


class Record:
    """The result of this run so far, and the inputs of the last case."""

    def __init__(self, out: Path, seconds: float):
        self.stop = time.monotonic() + seconds
        self.result = tuning.environment(DEVICE) | {"date": time.strftime("%Y-%m-%d"), "command": COMMAND}
        self.result |= {"cuda": torch.version.cuda, "driver": driver(), "roofs": None, "entries": []}
        self.file = out / report.result_name(self.result)
        self.case, self.sets, self.entry = None, None, None

    def begin(self, case: tuning.Case) -> None:
        if case is self.case:
            return
        self.sets = None  # freed before the next ones are drawn
        self.case, self.sets = case, tuning.input_sets(case, DEVICE)
        self.entry = tuning.new_entry(case, DEVICE, COMMAND)
        self.result["entries"].append(self.entry)

    def write(self) -> None:
        if DEVICE.type == "cuda":
            tuning.write_json(self.file, self.result)


RECORD = pytest.StashKey[Record]()


def driver() -> str | None:
    if DEVICE.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def pytest_addoption(parser):
    parser.addoption("--out", type=Path, default=report.RESULTS, help="folder for the result file of a GPU")
    parser.addoption("--seconds", type=float, default=float("inf"), help="skip what has not begun by then")


def pytest_configure(config):
    config.stash[RECORD] = Record(config.getoption("--out"), config.getoption("--seconds"))
    config.option.benchmark_quiet = True  # the table below is per call


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        pairs = [(case, column) for case in metafunc.module.CASES for column in case.columns]
        metafunc.parametrize("case, column", pairs, ids=[f"{case.name}, {column}" for case, column in pairs])


def pytest_collection_modifyitems(items):
    """What "auto" asks about first, for runs that are cut short."""
    items.sort(key=lambda item: item.callspec.params["case"] not in tuning.QUICK)


def pytest_terminal_summary(terminalreporter, config):
    if (result := config.stash[RECORD].result)["entries"]:
        terminalreporter.write_line("\n" + report.table(result))


@pytest.fixture
def timed(benchmark, request):
    """timed(case, column): check, time, record."""
    record = request.config.stash[RECORD]

    def run(case: tuning.Case, column: str) -> None:
        if time.monotonic() > record.stop:
            pytest.skip("the time is up")
        if DEVICE.type == "cuda":
            record.result["roofs"] = roofs(DEVICE)
        elif column not in ("eager", "compile"):
            pytest.skip("interpreted kernels are never timed")
        record.begin(case)
        entry = record.entry
        if column == "triton" and not tuning.judge(case, DEVICE, entry):
            record.write()
            why = entry["failed"]["triton"]
            (pytest.skip if tuning.has_no_kernel(why) else pytest.fail)(why)
        try:
            calls = tuning.prepare(tuning.column_function(case, column), record.sets, DEVICE)
            timing = tuning.time_calls(calls)
        except Exception as error:
            entry["failed"][column] = tuning.reason(error)
            entry["correct"] &= column != "triton"
            record.write()
            raise
        tuning.add_timing(entry, column, timing)
        record.write()
        benchmark.group = case.name
        benchmark.extra_info |= {"us_per_call": timing.us, "calls": calls.count}
        benchmark.pedantic(calls.replay, rounds=5)
        if column == "triton" and not entry["correct"]:
            pytest.fail(f"timed, and wrong: {entry['failed']['triton']}")

    return run
