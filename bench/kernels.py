"""Each op in columns eager | torch.compile | golfgpt, against the measured roof.

    python -m bench.kernels [OP ...] [--seconds N] [--out DIR]

On a GPU the kernel is checked before it is timed, and what was measured goes to DIR/gpu-*.json after every case
(its schema: report.py). Without a GPU eager and torch.compile are timed at small shapes, which only shows that the
benchmark works.
The exit code is 1 if an op of ours failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from golfgpt_kernels import timing, tuning

from bench import cases, report
from bench.peers import PEERS
from bench.roofs import driver, roofs

COMMAND = "python -m bench.kernels"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join({c.op: 0 for c in cases.CASES})}")
    parser.add_argument("--seconds", type=float, default=3600.0, help="leave out what is not done by then")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the result file of a GPU")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    result = tuning.environment(device) | {"date": time.strftime("%Y-%m-%d"), "command": COMMAND}
    result |= {"cuda": torch.version.cuda, "driver": driver(), "roofs": roofs(device) if cuda else None, "entries": []}
    chosen = [case for case in cases.cases() if not options.ops or case.op in options.ops]
    asked = {(case.op, case.shape, case.backward) for case in tuning.QUICK}
    chosen.sort(key=lambda case: (case.op, case.shape, case.backward) not in asked)  # for runs that are cut short

    def measure(case: tuning.Case) -> dict:
        columns = case.columns if cuda else ("eager", "compile")
        flops, traffic = cases.cost(case)
        return tuning.measure(case, device, command=COMMAND, columns=columns) | {"flops": flops, "bytes": traffic}

    for case, entry in zip(chosen, timing.within(options.seconds, chosen, measure), strict=True):
        if entry is None:
            print(f"{case.name}: not measured, the time is up")
            continue
        print(tuning.table_row(case, entry), flush=True)
        result["entries"].append(entry)
        if cuda:
            tuning.write_json(options.out / report.result_name(result), result)
    print("\n" + report.table(result))
    return int(any(entry["failed"] for entry in result["entries"] if entry["op"] not in PEERS))


if __name__ == "__main__":
    sys.exit(main())
