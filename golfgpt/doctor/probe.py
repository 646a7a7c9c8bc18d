"""Asking the machine: nvidia-smi, /proc, the cgroup files, torch."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from golfgpt_kernels import implementation, tuning
from torch.nn.attention import sdpa_kernel

import golfgpt
from golfgpt import recipes
from golfgpt.config import RunConfig
from golfgpt.distributed import Ranks
from golfgpt.train import attention_backend as attention


class Failed(Exception):
    """No answer; the message says why in a few words."""


def why(error: Exception) -> str:
    if isinstance(error, Failed | OSError):
        return getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def run(command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output. What hangs is killed with its children and not waited for: a driver in trouble leaves
    processes that cannot die."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment}
    try:
        process = subprocess.Popen(command, text=True, errors="replace", start_new_session=True, **pipes)
    except OSError as error:
        raise Failed(f"{command[0]} cannot be run: {error.strerror}") from error
    try:
        out, _ = process.communicate(timeout=seconds)
        return process.returncode, out
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"{Path(command[0]).name} gave no answer in {seconds:.0f} s") from None
        raise


def clocked(function: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


Gpu = dict[str, Any]  # by the names of QUERY; what nvidia-smi does not say, or says in unexpected words, is not there
WORD, NUMBER, BITS = r"(?!N/A$)[^\[].*", r"\d+(?:\.\d+)?", r"0x[0-9a-fA-F]{1,16}"
THROTTLE = "clocks_event_reasons.active"  # NVML's nvmlClocksEventReasons: why the clock is not higher
QUERY = {"name": WORD, "driver_version": WORD, "clocks.sm": NUMBER, "clocks.max.sm": NUMBER,
         "power.limit": NUMBER, "power.default_limit": NUMBER, THROTTLE: BITS}  # fmt: skip
READ: dict[str, Callable[[str], Any]] = {WORD: str, NUMBER: float, BITS: lambda cell: int(cell, 16)}
SMI_SECONDS = 20  # without persistence mode the driver is loaded anew, which takes a second or more for each GPU


def smi(*arguments: str) -> str:
    code, out = run(["nvidia-smi", *arguments], SMI_SECONDS)
    if code:
        raise Failed(f"nvidia-smi exits with {code}: {' '.join(out.split())[:120]}")
    return out


def parse_query(output: str) -> list[Gpu]:
    """One for each line of `--format=csv,noheader,nounits`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip()]
    if odd := [row for row in rows if len(row) != len(QUERY)]:
        raise Failed(f"nvidia-smi printed {','.join(odd[0])[:80]!r}, where {len(QUERY)} values were asked for")
    cells = [zip(QUERY.items(), row, strict=True) for row in rows]
    return [{name: READ[form](c) for (name, form), c in row if re.fullmatch(form, c, re.ASCII)} for row in cells]


def query() -> list[Gpu]:
    """All GPUs, also those hidden from torch. Older drivers know the reasons by another name."""
    asked = f"--query-gpu={','.join(QUERY)}"
    try:
        out = smi(asked, "--format=csv,noheader,nounits")
    except Failed as error:
        if "is not a valid field" not in str(error):
            raise
        out = smi(asked.replace("event", "throttle"), "--format=csv,noheader,nounits")
    return [] if "No devices were found" in out else parse_query(out)


def gpus() -> tuple[list[Gpu], str]:
    """Those of nvidia-smi; without any, why."""
    try:
        return query(), "it lists no GPU"
    except Failed as error:
        return [], str(error)


def parse_nvlink(output: str) -> list[list[float]]:
    """GB/s of each active link of each GPU, one direction, from `nvidia-smi nvlink --status`."""
    parts = re.split(r"^\s*GPU \d+:", output, flags=re.MULTILINE)[1:]
    return [[float(rate) for rate in re.findall(rf"^\s*Link \d+: ({NUMBER}) GB/s\s*$", p, re.MULTILINE)] for p in parts]


def nvlink(count: int) -> list[list[float]]:
    """As parse_nvlink; no links for each of `count` GPUs where nvidia-smi has nothing to say."""
    return parse_nvlink(smi("nvlink", "--status")) or [[]] * count


def usable(asked: str) -> tuple[list[torch.device], str | None]:
    """GPUs that compute, and why others do not."""
    devices, error = [], None
    for index in range(0 if asked == "cpu" else torch.cuda.device_count()):
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
            devices.append(torch.device("cuda", index))
        except Exception as caught:
            error = f"GPU {index}: {why(caught)}"
    return devices, error


def roof(device: torch.device) -> tuple[float, float]:
    """(TFLOP/s, GB/s) of a bf16 product of 4096 x 4096 x 4096 on random data (zeros run faster), and of a copy of 1 GiB
    or of a sixteenth of the free memory, bytes read plus bytes written."""
    size, count = 4096, min(2**28, torch.cuda.mem_get_info(device)[0] // 16)
    with torch.cuda.device(device):
        pairs = [{n: torch.randn(size, size, device=device, dtype=torch.bfloat16) for n in "ab"} for _ in range(3)]
        product = tuning.time_us(lambda i: i["a"] @ i["b"], pairs, device)
        vectors = {n: torch.randn(count, device=device) for n in "ab"}
        copy = tuning.time_us(lambda i: i["a"].copy_(i["b"]), [vectors], device)
    return 2 * size**3 / product.us / 1e6, 2 * 4 * count / copy.us / 1e3


def under_load(devices: Sequence[torch.device], roofs: Sequence[tuple[float, float]], size: int = 8192) -> list[Gpu]:
    """What nvidia-smi says while every GPU has two seconds of products before it; a queue holds 1000 launches."""
    for device, (speed, _) in zip(devices, roofs, strict=True):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
        for _ in range(min(900, int(2 * speed * 1e12 / (2 * size**3)))):
            a @ b
    found = query()
    for device in devices:
        torch.cuda.synchronize(device)
    return found


def all_reduce(device: str, processes: int) -> tuple[int, str, float]:
    """Processes, backend and GB/s of a sum over local processes, started as a run starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    torch.cuda.empty_cache()  # what was measured before left memory to this process
    code, out = run([*command, "-m", "golfgpt.doctor.all_reduce", device], 60, environment)
    told = re.search(r"^all-reduce (\d+) (\w+) (\S+)$", out, re.MULTILINE)
    if code or not told:
        errors = filter(re.compile(r"[\w.]+Error: \S|NCCL WARN").search, out.splitlines())
        raise Failed(next(errors, f"exit code {code}")[:200])
    return int(told[1]), told[2], float(told[3])


STEP_TOKENS = 65_536  # one of eight ranks' share of the baseline's step, as in bench/step.py
# Of the baseline's step: [{"gpu", "torch", "date", "eager": ms of eager's forward and backward, "golfgpt": ms of the
# whole step in golfgpt}]; `python -m bench.report --adopt` adds to it.
STEPS = Path(__file__).parent / "steps.json"


def steps(device: torch.device, gpu: str) -> tuple[float | None, dict[str, Any] | None]:
    """ms of the baseline's step as measured, None on a CPU; as expected of `gpu`."""
    return measure_step(device) if device.type == "cuda" else None, expected_step(gpu)


def expected_step(gpu: str, file: Path = STEPS) -> dict[str, Any] | None:
    """The newest measurement of the baseline's step on this kind of GPU."""
    found = [step for step in json.loads(file.read_text(encoding="utf-8")) if step["gpu"] == gpu]
    return max(found, key=lambda step: step["date"], default=None)


def measure_step(device: torch.device) -> float:
    """ms of the baseline's forward and backward on a rank's tokens, as bench.step's form "eager" takes them: bf16, not
    compiled, no optimizer."""
    from golfgpt.model.gpt import GPT

    config = recipes.get("baseline").config
    with sdpa_kernel(list(attention.BACKENDS.values())):
        select_attention(config, device, torch.bfloat16)
        try:
            return time_steps(GPT(config.model).to(device), STEP_TOKENS, config.data.seq_len, device)
        except torch.OutOfMemoryError:
            raise Failed(f"its {STEP_TOKENS:,} tokens do not fit into the GPU's free memory") from None
        finally:
            attention.use_flash3(False)


def select_attention(config: RunConfig, device: torch.device, dtype: torch.dtype) -> attention.Selection:
    shape = (STEP_TOKENS // config.data.seq_len, config.data.seq_len)
    return attention.select_backend("auto", config.model, [shape], Ranks(0, 1, device), dtype)


def time_steps(model: torch.nn.Module, tokens: int, seq_len: int, device: torch.device) -> float:
    """ms, the median of five after two warm-ups."""
    ids = torch.randint(model.config.vocab_size, (2, tokens // seq_len, seq_len), device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(ids[0], ids[1], dtype=torch.bfloat16).backward()

    return 1e3 * median([clocked(step, device) for _ in range(7)][2:])


def disk(folder: Path, size: int = 64_000_000) -> tuple[int, float]:
    """(bytes free, bytes a second of writing and fsync), by a file without a name that goes when it is closed."""
    parts = size // 1_000_000 * [os.urandom(1_000_000)]  # a file system that compresses would swallow zeros
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
    except OSError as error:
        raise Failed(f"{folder}: {why(error)}") from error
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize, size / seconds


def cpus() -> tuple[int, int, float | None]:
    """CPUs for this process, those of the machine, and the quota."""
    return len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota()


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs of the tightest cpu.max ("150000 100000", or "max 100000") of this process's cgroup and those above it."""
    path = re.search(r"^0::/(.*)$", own.read_text() if own.exists() else "", re.MULTILINE)
    here = root / (path[1] if path else "")
    files = [folder / "cpu.max" for folder in (here, *here.parents) if folder.is_relative_to(root)]
    texts = [file.read_text() for file in files if file.exists()]
    limits = [re.fullmatch(r"(\d+) ([1-9]\d*)\s*", text, re.ASCII) for text in texts]
    return min((int(limit[1]) / int(limit[2]) for limit in limits if limit), default=None)


def memory(file: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """(total, available) bytes."""
    found = dict(re.findall(r"^(MemTotal|MemAvailable): +(\d+) kB$", file.read_text(), re.MULTILINE))
    if len(found) != 2:
        raise Failed(f"{file} does not say it")
    return 1024 * int(found["MemTotal"]), 1024 * int(found["MemAvailable"])


def versions() -> dict[str, str | None]:
    """Of golfgpt, what it runs on, and every installed package."""
    packages = [*metadata.distributions()][::-1]  # of two versions the first on the path is imported
    found = {str(each.name).lower().replace("-", "_"): each.version for each in packages}
    cuda = torch.version.cuda
    if cuda:
        found |= {"cuDNN": torch.backends.cudnn.version(), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    own = {"golfgpt": golfgpt.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | own | {"CUDA": cuda}


def attention_backend(device: torch.device) -> tuple[str, attention.Selection]:
    """A dtype, and what a run of the baseline would choose in it: bfloat16 on a GPU that has it, else float32."""
    config, cuda = recipes.get("baseline").config, device.type == "cuda"
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    with sdpa_kernel(list(attention.BACKENDS.values())):  # which puts back what the process had enabled
        try:
            return str(dtype).removeprefix("torch."), select_attention(config, device, dtype)
        finally:
            attention.use_flash3(False)


Choices = dict[str, tuple[str, str]]  # of each kernel: "triton" or "eager", and why


def kernel_choices(device: torch.device) -> Choices:
    return {case.op: implementation(case.op, device, case.dtype) for case in tuning.QUICK}


def tune(device: torch.device, say: Callable[[str], None]) -> tuple[Choices, Choices, Path] | None:
    """Check and time the kernels: the choices before and after, and the file that impl="auto" reads; None on a CPU."""
    if device.type != "cuda":
        return None
    before = kernel_choices(device)
    try:
        tuning.tune(device, command="golfgpt doctor --tune", say=say)
    except tuning.CannotTune as error:
        raise Failed(str(error)) from error
    return before, kernel_choices(device), tuning.tuned_file(device)
