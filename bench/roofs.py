"""What this GPU does at best, measured: the roofs that every floor is computed from.

    python -m bench.roofs

tflops: a bf16 matrix product of 8192 x 8192 x 8192 through cuBLAS, on random data (a product of zeros runs faster).
gbps: a device-to-device copy of 4 GiB, bytes read plus bytes written; less where the device has less than 16 GiB free.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess

import torch
from golfgpt_kernels.timing import time_us


@functools.cache
def roofs(device: torch.device) -> dict[str, float]:
    """{"tflops", "gbps"}, measured once per process."""
    size, bf16 = 8192, torch.bfloat16
    sets = [{name: torch.randn(size, size, device=device, dtype=bf16) for name in "ab"} for _ in range(3)]
    matmul = time_us(lambda i: i["a"] @ i["b"], sets, device)
    del sets
    count = min(2**30, 2 ** int(math.log2(torch.cuda.mem_get_info(device)[0] / 16)))
    source = torch.randn(count, device=device)
    copy = time_us(lambda i: i["to"].copy_(i["from"]), [{"from": source, "to": torch.empty_like(source)}], device)
    return {"tflops": 2 * size**3 / matmul.us / 1e6, "gbps": 8 * count / copy.us / 1e3}


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def floor_us(flops: int, traffic: int, measured: dict[str, float]) -> float:
    """No version runs faster: the longer of the arithmetic and the memory traffic at the roofs."""
    return max(flops / measured["tflops"] / 1e6, traffic / measured["gbps"] / 1e3)


if __name__ == "__main__":
    print(json.dumps(roofs(torch.device("cuda", 0)), indent=1))
