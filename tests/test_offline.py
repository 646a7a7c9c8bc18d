"""Shipped tiles compiled for GPUs that are not there: no spills, shared memory fits, matmuls on tensor cores.

A selection that takes about a minute; `python -m bench.offline` compiles everything and writes bench/results/.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from golfgpt_kernels._tiles import TABLES

from bench import offline
from bench.offline import CASES, Job, all_jobs

ROOT = Path(__file__).parent.parent


def in_suite(job: Job) -> bool:
    """On sm_90 the first and the last variant, elsewhere the last; in bf16, whose code is fp16's, and fp32. Elsewhere
    without tf32, and without bf16 where nothing is multiplied."""
    case = CASES[job.case]
    if job.dtype == "float16":
        return False
    if job.sm == 90:
        return job.variant in (case.variants[0], case.variants[-1])
    return job.variant == case.variants[-1] and not job.tf32 and (case.dots or job.dtype == "float32")


JOBS = [job for job in all_jobs() if in_suite(job)]
SAMPLE = next(job for job in JOBS if job.case == "linear_relu2_fwd" and job.sm == 90 and job.dtype == "bfloat16")


def bad(m: int, n: int, k: int, warps: int, stages: int) -> Job:
    return replace(SAMPLE, tile={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages})


BAD = {
    "spill instructions": bad(256, 128, 64, 4, 2),
    "bytes of shared memory": bad(128, 256, 64, 8, 8),
    "without HGMMA": bad(32, 64, 64, 4, 3),
    "power of 2": bad(128, 256, 48, 8, 3),
}


@pytest.fixture(scope="module")
def compiled(triton_cache) -> dict[str, list[dict]]:
    """The rows of each job, from one process without TRITON_INTERPRET, which breaks compilation."""
    code = (
        "import json, sys; from bench.offline import Job, compile_all\n"
        "json.dump(compile_all(Job(**job) for job in json.load(sys.stdin)), sys.stdout)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = triton_cache
    jobs = json.dumps([asdict(job) for job in (*JOBS, *BAD.values())])
    done = subprocess.run([sys.executable, "-c", code], input=jobs, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {str(job): [] for job in (*JOBS, *BAD.values())}
    for row in json.loads(done.stdout):
        rows[str(offline.job_of(row))].append(row)
    return rows


def test_every_table_has_a_case():
    assert {case.table for case in CASES.values()} >= TABLES.keys()


def test_every_kernel_has_a_case(compiled):
    modules = [module for name, module in sys.modules.items() if name.startswith("golfgpt_kernels.")]
    kernels = {
        offline.kernel_name(kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and hasattr(kernel, "fn")
    }
    assert len(kernels) > 5
    assert kernels == {row["kernel"] for rows in compiled.values() for row in rows if "kernel" in row}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: str(job).replace(" ", "-"))
def test_gate(job, compiled):
    assert compiled[str(job)]
    assert not [failure for row in compiled[str(job)] for failure in offline.failures(row)]


def test_gluon_specialises_warps(compiled):
    rows = [row for found in compiled.values() for row in found if row["case"] == "relu2_mlp_gluon"]
    assert [row["variant"]["grad"] for row in rows] == [False, True]
    assert all(row[opcode] for row in rows for opcode in ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"))


@pytest.mark.parametrize("expected", BAD)
def test_gate_has_teeth(expected, compiled):
    (row,) = compiled[str(BAD[expected])]
    assert expected in " ".join(offline.failures(row))


def test_report(compiled, tmp_path):
    rows = [row for found in compiled.values() for row in found]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        offline.print_rows(rows)
    assert printed.getvalue().count("FAILS") >= len(BAD)
    assert json.loads(offline.write_json(rows, tmp_path).read_text())["rows"] == rows


@pytest.mark.parametrize(
    "file", sorted((ROOT / "bench" / "results").glob("offline-*.json")), ids=lambda file: file.name
)
def test_results_are_of_what_ships(file):
    """Run `python -m bench.offline` with this version of triton after a change of tiles, or delete the file."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert {str(offline.job_of(row)) for row in rows} == {str(job) for job in all_jobs()}
    assert not [(row, failure) for row in rows for failure in offline.failures(row)]
