"""A sample of the faults that `make test-faults` injects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the faults are Linux's")
def test_a_run_survives_a_sample_of_faults(tmp_path):
    """In a process of its own: this one may have threads of autograd, which do not survive the forks."""
    command = [sys.executable, "-m", "experiments.faults", "--sample", "--processes", "1", "--out", tmp_path / "rows"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, cwd=Path(__file__).parents[1])
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 19 and not [row for row in rows if not row["survived"]], done.stdout
