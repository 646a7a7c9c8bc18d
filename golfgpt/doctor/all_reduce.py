"""python -m golfgpt.doctor.all_reduce DEVICE: what each process of `probe.all_reduce` runs, on 64 MB."""

from __future__ import annotations

import signal
import sys
from functools import partial
from statistics import median

import torch

from golfgpt import distributed
from golfgpt.doctor.probe import ALL_REDUCE_SECONDS, seconds

if __name__ == "__main__":
    signal.alarm(ALL_REDUCE_SECONDS)  # ends this process even if the collective hangs
    ranks, count, times = distributed.start(sys.argv[1]), 16_000_000, []
    try:
        for _ in range(8):
            values = torch.ones(count, device=ranks.device)
            times.append(seconds(partial(ranks.sum_, values), ranks.device))
            if not (values == ranks.world).all():
                raise ArithmeticError("the all-reduce gave a wrong sum")
        if ranks.is_main:  # 2 (n - 1) / n of the bytes over the time: comparable with a link's rate for any n
            gbps = 2 * (ranks.world - 1) / ranks.world * 4 * count / median(times[3:]) / 1e9
            print("all-reduce", gbps, torch.distributed.get_backend(), flush=True)
    finally:
        ranks.close()
