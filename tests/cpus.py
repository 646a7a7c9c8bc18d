"""make test-cpus: the tests marked `numeric`, once for each kind of CPU that this one can be made to behave like.

PyTorch, oneDNN, MKL and OpenBLAS (numpy's, with which Triton's interpreter multiplies) choose their code by the CPU,
and each choice rounds otherwise. A row tells one of them what to take and leaves the others alone; one is a BLAS that
nobody has (blas.py). Rows alternate between one thread and two. Results are kept in build/test-cpus.jsonl for this
commit, the changes to it, this CPU and these versions: a second call goes on with what is missing, --again starts over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE = ROOT / "build" / "test-cpus.jsonl"
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# Flags of /proc/cpuinfo that a row needs. Without them PyTorch would say all the same that it has AVX-512, and oneDNN
# would silently take less.
BY_FLAGS = {
    "ATEN_CPU_CAPABILITY=default": set(),
    "ATEN_CPU_CAPABILITY=avx2": {"avx2", "fma"},
    "ATEN_CPU_CAPABILITY=avx512": AVX512,
    "ONEDNN_MAX_CPU_ISA=AVX2": {"avx2"},
    "ONEDNN_MAX_CPU_ISA=AVX512_CORE": AVX512,
    "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16": AVX512 | {"avx512_bf16"},
    "OPENBLAS_CORETYPE=Prescott": {"pni"},
    "OPENBLAS_CORETYPE=Haswell": {"avx2", "fma"},
    "GOLFGPT_TEST_BLAS=other": set(),
}
# What MKL says of itself where it does as it is told. On AMD's CPUs it obeys COMPATIBLE only.
BY_MKL = {
    "MKL_CBWR=COMPATIBLE": "CNR:COMPATIBLE",
    "MKL_CBWR=AVX2": "CNR:AVX2",
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2": "(Intel(R) SSE4.2) enabled processors",
    "MKL_ENABLE_INSTRUCTIONS=AVX2": "(Intel(R) AVX2) enabled processors",
}
ROWS = [*BY_FLAGS, *BY_MKL]


def cpu() -> dict[str, str]:
    """Of Linux's first processor; empty elsewhere, and then no row that needs a flag is available."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def available(row: str) -> bool:
    if row in BY_FLAGS:
        return set(cpu().get("flags", "").split()) >= BY_FLAGS[row]
    code = "import torch; torch.ones(9, 9) @ torch.ones(9, 9)"
    environment = os.environ | dict([row.split("=")], MKL_VERBOSE="1")
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return BY_MKL[row] in said.stdout


def tested() -> str:
    """What results are of: commit, changes, CPU, versions."""
    import numpy
    import torch

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout

    changes = git("diff", "HEAD")
    commit = git("rev-parse", "--short", "HEAD").strip() + ("+" + digest(changes) if changes else "")
    name = cpu().get("model name", "unknown CPU") + " " + digest(cpu().get("flags", ""))
    return f"{commit}, {name}, torch {torch.__version__}, numpy {numpy.__version__}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run(row: str, threads: int, jobs: int, seconds: float) -> dict | None:
    """One row's result, or None if the time was up before its end."""
    environment = os.environ | dict.fromkeys(
        ("GOLFGPT_TEST_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    chosen = ["-m", "numeric and not slow and not long", "-k", "not opcheck"]  # opcheck takes long and compares little
    command = [sys.executable, "-m", "pytest", *chosen, "-n", str(jobs), "--tb=short", "-p", "no:cacheprovider"]
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment | dict([row.split("=")]), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # pytest ends its workers
        process.communicate()
        return None
    count = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|errors?)", output[-300:])}
    failed = sum(count.values()) - count.get("passed", 0)
    if process.returncode:
        print(output)
        failed = failed or "no end"  # it crashed, or found no tests
    taken = round(time.monotonic() - start)
    return {"row": row, "threads": threads, "passed": count.get("passed", 0), "failed": failed, "seconds": taken}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seconds", type=float, default=1800, help="after which it ends, to go on in a second call")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    FILE.parent.mkdir(exist_ok=True)
    if options.again:
        FILE.unlink(missing_ok=True)
    of, lines = tested(), FILE.read_text().splitlines() if FILE.exists() else []
    results = {line["row"]: line for line in map(json.loads, lines) if line.pop("of") == of}
    print(of)
    for i, row in enumerate(row for row in ROWS if available(row)):
        if row in results or time.monotonic() > deadline:
            continue
        print(row, flush=True)
        result = run(row, 1 + i % 2, options.jobs, deadline - time.monotonic())
        if result:
            results[row] = result
            with open(FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({"of": of, **result}) + "\n")
    return table(results)


def table(results: dict[str, dict]) -> int:
    print(f"\n{'row':36}{'threads':>8}{'passed':>8}{'failed':>8}{'seconds':>9}")
    good = True
    for row in ROWS:
        if row in results:
            result = results[row]
            print(f"{row:36}" + "".join(f"{result[key]:>8}" for key in ("threads", "passed", "failed")), end="")
            print(f"{result['seconds']:>9}")
            good &= not result["failed"]
        elif not available(row):
            print(f"{row:36}{'not available':>16}")
        else:
            print(f"{row:36}{'not run, the time was up; call it again':>42}")
            good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
