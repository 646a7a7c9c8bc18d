"""Forces the race at the end of a rank: python tests/exit_race.py --ranks 2 --runs 100 [--late]

A gloo thread that frees a collective's tensor takes the GIL. If the interpreter is ending by then, Python 3.11 unwinds
the thread, and the process aborts: "terminate called without an active exception", exit code -6. Here it comes
too late: it shares a core with the main thread, gets it when nobody else wants it, and is let go while the interpreter
ends. With --late the process group is older than torch.distributed.nn.functional, which then holds it, as before
`golfgpt.distributed.start` imported that module first. Runs with an abort, on two busy cores, torch 2.13 on the CPU:

    --late     2 ranks: 62 of 100     3 ranks: 72 of 100
    without    2 ranks:  0 of 100     3 ranks:  0 of 100

Linux; needs no torchrun. Exits with 1 when a rank did not end with 0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

from golfgpt import distributed


def schedule_gloo(policy: int) -> None:
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != os.getpid():
            os.sched_setscheduler(thread, policy, os.sched_param(0))


class WaitsForGloo:
    def __del__(self):
        schedule_gloo(os.SCHED_OTHER)
        time.sleep(0.5)


def rank_main(late: bool) -> None:
    if late:
        dist.init_process_group("gloo")
    ranks = distributed.start("cpu")
    importlib.import_module("torch.distributed.nn.functional")  # as AdamW does by torch._dynamo, which takes seconds
    ranks.sum_(torch.ones(1))
    cores = sorted(os.sched_getaffinity(0))
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {cores[ranks.rank % len(cores)]})
    schedule_gloo(os.SCHED_IDLE)
    sys.setswitchinterval(1000)  # the main thread keeps the GIL until it sleeps
    ranks.sum_(torch.ones(1))
    ranks.close()


def fork_ranks(args: argparse.Namespace) -> list[int]:
    """The ranks' exit codes. A forked rank leaves by the end of this file, as any program does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(args.ranks):
        if not (child := os.fork()):
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(args.ranks), **address)
            sys.exit(rank_main(args.late))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--late", action="store_true")
    args = parser.parse_args()
    keep = WaitsForGloo()
    codes = [fork_ranks(args) for _ in range(args.runs)]
    print(f"{sum(-6 in run for run in codes)} of {args.runs} runs with an abort")
    sys.exit(any(map(any, codes)))
