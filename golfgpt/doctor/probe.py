"""What takes more than a line to measure."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from golfgpt import recipes
from golfgpt.distributed import Ranks
from golfgpt.model.gpt import GPT
from golfgpt.train import attention_backend
from golfgpt.train.compute_dtype import DtypeChoice, select_dtype
from golfgpt.train.forecast import Forecast, forecast_recipe


class CommandFailed(Exception):
    """The message says why in a few words."""


def run(command: str | Sequence[str], timeout: float = 20, **options: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, in the form that torch's collect_env takes. A driver without persistence mode is
    loaded anew, which takes a second or more for each GPU."""
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, shell=isinstance(command, str), timeout=timeout, **pipes, **options)
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer in {timeout:.0f} s"
    return done.returncode, done.stdout, done.stderr


def seconds(function: Callable[[], object], device: torch.device) -> float:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def usable_gpus() -> tuple[list[torch.device], str | None]:
    """GPUs that compute under torch, and why another one does not."""
    devices, error = [], None
    for index in range(torch.cuda.device_count()):
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
            devices.append(torch.device("cuda", index))
        except Exception as caught:
            error = f"GPU {index}: {caught!r:.160}"
    return devices, error


class Gpu(NamedTuple):
    """Speeds, and what NVML says while the GPU multiplies matrices. Links are NVLinks, their GB/s in one direction."""

    name: str
    tflops: float
    copy_gbps: float
    clock_mhz: float = math.nan
    max_clock_mhz: float = math.nan
    watts: float = math.nan
    default_watts: float = math.nan
    reasons: int = 0
    """Bits of nvmlClocksEventReasons: why the clock is not higher."""
    links: int = 0
    link_gbps: float = 0.0


def measure_gpu(device: torch.device, size: int = 8192, products: int = 200) -> Gpu:
    """A bf16 product of random matrices (zeros run faster), and a copy of 1 GiB or of a sixteenth of the free memory,
    bytes read plus bytes written."""
    count = min(2**28, torch.cuda.mem_get_info(device)[0] // 16)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    x, y = torch.randn(2, count, device=device)
    state: dict[str, float] = {}

    def multiply() -> None:
        for _ in range(products):
            a @ b
        state.update(read_nvml(device))  # while products are queued

    def copy() -> None:
        for _ in range(20):
            x.copy_(y)

    multiply()  # not counted
    tflops = 2 * size**3 * products / seconds(multiply, device) / 1e12
    copy()
    gbps = 2 * 4 * count * 20 / seconds(copy, device) / 1e9
    return Gpu(torch.cuda.get_device_name(device), tflops, gbps, **state)


class Cpu(NamedTuple):
    """Speeds with the threads that torch has."""

    gflops: float
    bf16_gflops: float
    copy_gbps: float


def measure_cpu(size: int = 512, count: int = 2**24) -> Cpu:
    """A product of square matrices in float32 and in bfloat16, and a copy of `count` float32 numbers, bytes read plus
    bytes written; the fastest of five each. A CPU without instructions for bfloat16 multiplies at 1 GFLOP/s."""

    def fastest(work: Callable[[], object]) -> float:
        return min(seconds(work, torch.device("cpu")) for _ in range(5))

    a, x, y = torch.randn(size, size), torch.zeros(count), torch.zeros(count)
    b = a.bfloat16()
    speeds = (2 * size**3 / fastest(partial(torch.mm, m, m)) / 1e9 for m in (a, b))
    return Cpu(*speeds, 2 * 4 * count / fastest(partial(x.copy_, y)) / 1e9)


def read_nvml(device: torch.device) -> dict[str, float]:
    """Those fields of Gpu that this GPU reports; none without nvidia-ml-py."""
    try:
        import pynvml as nvml
    except ImportError:
        return {}
    found = {}
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        found["clock_mhz"] = nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)
        found["max_clock_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM)
        found["reasons"] = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)  # the name that all drivers know
        found["watts"] = nvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1e3
        found["default_watts"] = nvml.nvmlDeviceGetPowerManagementDefaultLimit(gpu) / 1e3
        fields = [nvml.NVML_FI_DEV_NVLINK_LINK_COUNT, nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON]
        count, speed = (field.value.uiVal for field in nvml.nvmlDeviceGetFieldValues(gpu, fields))
        found["links"] = sum(nvml.nvmlDeviceGetNvLinkState(gpu, i) for i in range(count))
        found["link_gbps"] = speed / 1e3
    return found


ALL_REDUCE_SECONDS = 60


def all_reduce(device: str, processes: int) -> tuple[float, str]:
    """GB/s and backend of a sum over local processes, started as a run starts them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    torch.cuda.empty_cache()  # earlier checks left memory to this process
    command = [*torchrun, "-m", "golfgpt.doctor.all_reduce", device]
    code, out, error = run(command, ALL_REDUCE_SECONDS + 10, env=environment)
    if not code and (told := re.search(r"^all-reduce (\S+) (\w+)$", out, re.MULTILINE)):
        return float(told[1]), told[2]
    reasons = re.findall(r"[\w.]+Error: \S.*|.*NCCL WARN.*|no answer.*", out + "\n" + error)
    raise CommandFailed(reasons[0][:200] if reasons else f"exit code {code}")


STEP_TOKENS = 65_536  # one of eight ranks' share of the baseline's step, as in bench/forms.py
# Of the baseline's step: [{"gpu", "torch", "date", "eager": ms of eager's forward and backward, "golfgpt": ms of the
# whole step in golfgpt}]; `python -m bench.report --adopt` adds to it.
STEPS = Path(__file__).parent / "steps.json"


def expected_step(gpu: str, file: Path = STEPS) -> dict[str, Any] | None:
    """The newest measurement of the baseline's step on this kind of GPU."""
    found = [step for step in json.loads(file.read_text(encoding="utf-8")) if step["gpu"] == gpu]
    return max(found, key=lambda step: step["date"], default=None)


BASELINE, SMALL = (recipes.get(name).config for name in ("baseline", "small"))


def choose_dtype(device: torch.device) -> DtypeChoice:
    """Of the baseline on a GPU, of small on a CPU."""
    choice = "auto" if device.type == "cpu" or torch.cuda.is_bf16_supported() else "float32"
    config = SMALL if device.type == "cpu" else BASELINE
    return select_dtype(choice, GPT(config.model), config.data, Ranks(0, 1, device))


def small_step() -> Forecast:
    return forecast_recipe(SMALL)


def choose_attention(device: torch.device, dtype: torch.dtype) -> attention_backend.Selection:
    shape, ranks = (STEP_TOKENS // BASELINE.data.seq_len, BASELINE.data.seq_len), Ranks(0, 1, device)
    return attention_backend.select_backend("auto", BASELINE.model, [shape], ranks, dtype, enable=False)


def baseline_step(device: torch.device) -> float:
    """ms of the baseline's forward and backward on a rank's tokens: bf16, not compiled, no optimizer."""
    with attention_backend.only(choose_attention(device, torch.bfloat16).backend):
        return time_steps(GPT(BASELINE.model).to(device), STEP_TOKENS, BASELINE.data.seq_len, device)


def time_steps(model: GPT, tokens: int, seq_len: int, device: torch.device) -> float:
    """ms, the median of five after two warm-ups."""
    ids = torch.randint(model.config.vocab_size, (2, tokens // seq_len, seq_len), device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(ids[0], ids[1], dtype=torch.bfloat16).backward()

    return 1e3 * median([seconds(step, device) for _ in range(7)][2:])


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs of the tightest cpu.max ("150000 100000", or "max 100000") of this process's cgroup and those above it."""
    path = re.search(r"^0::/(.*)$", own.read_text() if own.exists() else "", re.MULTILINE)
    here = root / (path[1] if path else "")
    files = [folder / "cpu.max" for folder in (here, *here.parents) if folder.is_relative_to(root)]
    texts = [file.read_text() for file in files if file.exists()]
    limits = [re.fullmatch(r"(\d+) ([1-9]\d*)\s*", text, re.ASCII) for text in texts]
    return min((int(limit[1]) / int(limit[2]) for limit in limits if limit), default=math.inf)
