"""The checks, in the order of the table. Each one measures, then yields a row's value and its faults: whether each is
there, its verdict, and what to do. The first fault that is there counts.

    ok        as it should be
    slow      works, but slower than such a machine can be
    missing   not there
    broken    not there, and a run needs it; in the table it is missing
    unknown   could not be read or compared, or only a person can judge it

The thresholds are judgements. None of them was calibrated on a GPU that runs slowly.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from golfgpt_kernels import implementation, tuning
from torch.utils import collect_env

import golfgpt
from golfgpt.doctor import probe
from golfgpt.doctor.probe import Gpu
from golfgpt.errors import InputError
from golfgpt.tables import plural, table
from golfgpt.train.compute_dtype import DtypeChoice
from golfgpt.train.machine_cache import package_version


@dataclass(frozen=True)
class Row:
    name: str
    value: str
    advice: str = ""
    """What to do; empty if and only if the verdict is ok."""
    verdict: Literal["ok", "slow", "missing", "unknown"] = "ok"
    broken: bool = False
    """Whether a run needs what is missing."""

    @classmethod
    def judge(cls, name: str, value: str, *faults: tuple[object, str, str]) -> Row:
        for there, verdict, advice in faults:
            if there:
                return cls(name, value, advice, "missing" if verdict == "broken" else verdict, verdict == "broken")
        return cls(name, value)


@dataclass
class Machine:
    """What is asked, and what several checks need to know."""

    asked: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int | None = None
    retune: bool = False
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        cpu = self.asked == "cpu"
        smi = None if cpu else collect_env.get_gpu_info(probe.run)
        self.listed = re.findall(r"^GPU \d+: (.*)$", smi or "", re.MULTILINE)  # those hidden from torch too
        self.devices, self.error = ([], None) if cpu else probe.usable_gpus()
        self.best = self.devices[0] if self.devices else torch.device("cpu")

    @cached_property
    def dtype(self) -> DtypeChoice:
        return probe.choose_dtype(self.best)

    @cached_property
    def gpus(self) -> list[Gpu]:
        return [probe.measure_gpu(device) for device in self.devices]


Answer = tuple[Any, ...]
CHECKS: dict[str, Callable[[Machine], Iterator[Answer]]] = {}
"""They yield nothing if they do not apply; an exception becomes a row."""


def check(name: str) -> Callable[[Any], Any]:
    return lambda function: CHECKS.setdefault(name, function)


def run_check(name: str, machine: Machine) -> list[Row]:
    try:
        return [Row.judge(name, *answer) for answer in CHECKS[name](machine)]
    except Exception as error:
        return [Row(name, "not available", f"it was not read: {error!r:.200}", "unknown")]


def diagnose(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    *,
    processes: int | None = None,
    retune: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """The rows of all checks; a check that cannot be made is a row that says so.

    `processes` join the all-reduce, on the CPU if there are fewer GPUs; None: one per GPU, and no all-reduce on fewer
    than two. `retune` takes 50 s more and prints with `say`. `progress` gets the name of each check as it begins.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("doctor is one process and starts the others itself: run it without torchrun")
    if processes is not None and not 1 <= processes <= 64:
        raise InputError(f"--processes: expected 1 to 64, got {processes}")
    machine, found = Machine(device, processes, retune, say), []
    for name in CHECKS:
        progress(name)
        found += run_check(name, machine)
    return found


def exit_code(rows: Iterable[Row]) -> int:
    """3 if a run could not work, else 0."""
    return 3 if any(row.broken for row in rows) else 0


def text(rows: Sequence[Row]) -> str:
    """The table, below it the advice of each row that is not ok, what a run needs first, and last the next step."""
    lines = [table(("check", "verdict", "value"), [(row.name, row.verdict, row.value) for row in rows]), ""]
    for row in sorted(rows, key=lambda row: (not row.broken, row.verdict == "unknown")):
        if row.verdict != "ok":
            lines.append(f"{row.name}{' (a run needs it)' if row.broken else ''}: {row.advice}")
    counts = Counter(row.verdict for row in rows)
    verdicts = ", ".join(f"{counts[v]} {v}" for v in ("ok", "slow", "missing", "unknown"))
    then = "mend what a run needs, then golfgpt doctor again"
    if not exit_code(rows):
        then = "golfgpt demo trains a small model; golfgpt preflight --recipe NAME --data.path DIR tries your own run"
    return "\n".join([*lines, f"{len(rows)} checks: {verdicts}", f"next: {then}"])


# ---- GPUs


@check("GPUs")
def usable(machine: Machine) -> Iterator[Answer]:
    count, listed, build = len(machine.devices), len(machine.listed), torch.version.cuda
    visible, error = os.environ.get("CUDA_VISIBLE_DEVICES"), machine.error
    value = f"torch can use {count} of {max(count, listed)}" if listed or count else "none"
    if listed:
        names = ", ".join(f"{number} x {name}" for name, number in Counter(machine.listed).items())
        value += f": {names}, driver {collect_env.get_nvidia_driver_version(probe.run)}"
    if not count and not error and machine.asked != "cuda" and (visible is not None or not listed):
        silent = machine.asked == "auto" and not listed and shutil.which("nvidia-smi")
        yield f"{value}; runs use the CPU", (silent, "unknown", "nvidia-smi lists no GPU: run it to see why")
        return
    mixed, problem = len(set(machine.listed)) > 1, error or "it sees none"
    yield (
        value,
        (count and not error and mixed, "slow", "every step waits for the slowest GPU: use one kind"),
        (count and not error, "ok", ""),
        (build is None, "broken", "this torch was built for CPUs: install the CUDA build of the same version"),
        (not count and visible is not None, "broken", f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it"),
        (error or listed, "broken", f"torch (CUDA {build}) cannot use them ({problem}): update the driver first"),
        (True, "broken", "there is no GPU: rent one, pass it to the container (--gpus all), or use the CPU"),
    )


# NVIDIA's datasheets of each product (H100, H200 and A100 Tensor Core GPU; half of the figure if only the one "with
# sparsity" is printed) and the architecture white papers of the cards (Ada AD102, Ampere GA102), by NVIDIA's names.
DATASHEET = {  # TFLOP/s in bf16, dense, accumulated in fp32; GB/s
    "NVIDIA H100 80GB HBM3": (989, 3350), "NVIDIA H100 PCIe": (756, 2000), "NVIDIA H200": (989, 4800),
    "NVIDIA A100-SXM4-40GB": (312, 1555), "NVIDIA A100-SXM4-80GB": (312, 2039),
    "NVIDIA A100-PCIE-40GB": (312, 1555), "NVIDIA A100 80GB PCIe": (312, 1935),
    "NVIDIA GeForce RTX 4090": (165, 1008), "NVIDIA GeForce RTX 3090": (71, 936),
}  # fmt: skip


@check("GPU speed")
def speed(machine: Machine) -> Iterator[Answer]:
    for index, gpu in enumerate(machine.gpus):
        best = DATASHEET.get(gpu.name, (math.nan, math.nan))
        product, copy = gpu.tflops / best[0], gpu.copy_gbps / best[1]
        value = (
            f"GPU {index}: matrix products {gpu.tflops:,.0f} TFLOP/s in bfloat16, memory copy {gpu.copy_gbps:,.0f} GB/s"
        )
        known = gpu.name in DATASHEET
        yield (
            f"{value}: {product:.0%} and {copy:.0%} of the datasheet" if known else value,
            (not known, "unknown", f"no datasheet of {gpu.name} is known here: compare with the vendor's"),
            # 788 of 989 TFLOP/s and 4.3 of 4.8 TB/s were seen on an H200.
            (product < 0.55, "slow", f"GPU {index}: a slow product: see GPU state, else change the machine"),
            (copy < 0.7, "slow", f"GPU {index}: a slow copy: see GPU state, else change the machine"),
        )


# Bits of nvmlClocksEventReasons, and what to do. Full clocks at the power cap are how these GPUs work.
REASONS = {
    0x60: ("heat", "too hot for full clocks: improve the cooling or change the machine"),
    0x88: ("the board", "its heat or power supply does not allow full clocks: change the machine"),
    0x12: ("settings", "clocks were set lower (sudo nvidia-smi -rac resets them) or a sync boost group lowers them"),
    0x4: ("the power cap", ""),
}


@check("GPU state")
def state(machine: Machine) -> Iterator[Answer]:
    """Under load."""
    if any(math.isnan(gpu.clock_mhz) for gpu in machine.gpus):
        silent, remedy = "nvidia-ml-py is not installed", "pip install nvidia-ml-py"
        if package_version("nvidia-ml-py"):
            silent, remedy = "NVML does not answer", "run nvidia-smi to see why"
        yield silent, (True, "unknown", f"clocks, power cap, throttling and NVLink were not read: {remedy}")
        return
    several, most = len(machine.gpus) > 1, max((gpu.links for gpu in machine.gpus), default=0)
    for index, gpu in enumerate(machine.gpus):
        reasons = [reason for bits, reason in REASONS.items() if gpu.reasons & bits]
        limits = " and ".join(word for word, _ in reasons) or (f"reason {gpu.reasons:#x}" if gpu.reasons else "nothing")
        remedies = "; ".join(remedy for _, remedy in reasons if remedy)
        value = (
            f"GPU {index}: clock {gpu.clock_mhz:,.0f} of {gpu.max_clock_mhz:,.0f} MHz under load, limited by {limits}"
        )
        value += f"; power cap {gpu.watts:.0f} W, default {gpu.default_watts:.0f} W"
        yield (
            f"{value}; {gpu.links} NVLinks of {gpu.link_gbps:.1f} GB/s each" if several else value,
            (remedies, "slow", f"GPU {index}: {remedies}"),
            (
                gpu.watts < 0.99 * gpu.default_watts,
                "slow",
                f"GPU {index}: products are slower at less power: sudo nvidia-smi -pl {gpu.default_watts:.0f}",
            ),
            # A matrix product at full power takes a GPU to two thirds of its highest clock, which is no fault.
            (gpu.clock_mhz < 0.55 * gpu.max_clock_mhz, "slow", f"GPU {index}: a low clock: change the machine"),
            (several and not most, "slow", "gradients travel over PCIe: choose a machine with NVLink"),
            (gpu.links < most, "slow", f"GPU {index}: fewer active NVLinks than on others: change the machine"),
            (gpu.reasons > 0x1FF, "unknown", f"GPU {index}: a reason unknown to golfgpt: nvidia-smi -q explains it"),
        )


@check("all-reduce")
def all_reduce(machine: Machine) -> Iterator[Answer]:
    """Between local processes, on GPUs if there are enough."""
    processes = machine.processes or len(machine.devices)
    if processes < 2:
        return
    try:
        gbps, backend = probe.all_reduce("cuda" if len(machine.devices) >= processes else "cpu", processes)
    except probe.CommandFailed as error:
        advice = f"local processes cannot sum gradients, nor could a run (NCCL_DEBUG=INFO): {error}"
        yield "failed", (True, "broken", advice)
        return
    least = max([5.0, *(gpu.links * gpu.link_gbps / 4 for gpu in machine.gpus)])
    advice = f"below {least:.0f} GB/s: NCCL_DEBUG=INFO names the path that NCCL takes"
    value = f"{gbps:,.1f} GB/s, summing 64 MB over {processes} processes with {backend}"
    yield value, (backend == "nccl" and gbps < least, "slow", advice)


@check("baseline step")
def baseline_step(machine: Machine) -> Iterator[Answer]:
    """Forward and backward of a rank's tokens, as bench.step's form "eager" takes them."""
    if not machine.devices:
        return
    ms, expected = probe.baseline_step(machine.best), probe.expected_step(torch.cuda.get_device_name(machine.best))
    value = f"forward and backward of {probe.STEP_TOKENS:,} tokens, not compiled: {ms:.1f} ms"
    if expected is None:
        advice = "nothing to compare with, and nothing to do"
        yield f"{value}; no committed measurement for this GPU", (True, "unknown", advice)
        return
    value += f", expected {expected['eager']:.1f} ms; golfgpt's whole step {expected['golfgpt']:.1f} ms"
    value += f" ({expected['date']})"
    ratio = ms / expected["eager"]
    advice = f"{ratio:.2f} x the committed time (torch {expected['torch']}): see GPU speed, GPU state and CPUs"
    yield value, (ratio > 1.15, "slow", advice)


# ---- the host


@check("disk")
def disk(machine: Machine) -> Iterator[Answer]:
    folder = Path.cwd()
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        yield "not writable", (True, "broken", f"runs are written here ({folder}: {error.strerror}): start elsewhere")
        return
    free = shutil.disk_usage(folder).free / 1e9
    # Two checkpoints of 26 M parameters with optimizer state, and one being written.
    advice = "a run's checkpoints take up to 1 GB: free some, or start elsewhere"
    yield f"{free:,.1f} GB free in {folder}", (free < 1, "broken", advice)


@check("CPUs")
def cpus(machine: Machine) -> Iterator[Answer]:
    available, needed = len(os.sched_getaffinity(0)), 2 * len(machine.devices)
    time = min(available, probe.cpu_quota())
    yield (
        f"{available} for this process, of {os.cpu_count()} in the machine"
        + (f", limited to the time of {time:.3g}" if time < available else ""),
        (time < needed, "slow", f"each GPU takes two, for its process and its data, together {needed}: ask for more"),
        (time < available, "slow", f"torch starts {available} threads: --runtime.threads {max(1, int(time))}"),
    )


@check("CPU speed")
def cpu_speed(machine: Machine) -> Iterator[Answer]:
    if machine.devices:
        return
    cpu, threads = probe.measure_cpu(), torch.get_num_threads()
    yield (
        f"matrix products {cpu.gflops:,.0f} GFLOP/s in float32, {cpu.bf16_gflops:,.0f} in bfloat16; memory copy "
        f"{cpu.copy_gbps:.1f} GB/s; {plural(threads, 'thread')}, {torch.backends.cpu.get_cpu_capability()}",
    )


@check("memory")
def memory(machine: Machine) -> Iterator[Answer]:
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, available = (int(kilobytes[name]) * 1024 / 1e9 for name in ("MemTotal", "MemAvailable"))
    advice = "the smallest run, the demo, takes 0.9 GB: end something else"
    yield f"{available:.1f} GB available of {total:.1f} GB", (available < 1, "broken", advice)


@check("/dev/shm")
def shared_memory(machine: Machine) -> Iterator[Answer]:
    """A container gets 64 MB unless it is told otherwise."""
    size, verdict = shutil.disk_usage("/dev/shm").total, "missing" if len(machine.devices) > 1 else "unknown"
    advice = "too little for NCCL between GPUs and for DataLoader workers: --shm-size 8g"
    yield f"{size / 1e9:.2f} GB of shared memory", (size < 1e9, verdict, advice)


# ---- software, and the choices that a run of the baseline would make


@check("versions")
def versions(machine: Machine) -> Iterator[Answer]:
    packages = {name: package_version(name) for name in ("brotli", "zstandard", "huggingface_hub")}
    found = {"golfgpt": golfgpt.__version__, "python": platform.python_version(), "torch": torch.__version__} | packages
    if torch.version.cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(), "NCCL": nccl}
    value = ", ".join(f"{name} {version}" for name, version in found.items())
    absent = [name for name, version in packages.items() if not version]
    install = f"pip install {' '.join(absent)}"
    yield (
        f"{value}, {collect_env.get_os(probe.run)}",
        ({"brotli", "zstandard"} & set(absent), "broken", f"data, artifacts and scores need them: {install}"),
        (absent, "missing", f"published data cannot be downloaded: {install}"),
    )


@check("triton")
def triton(machine: Machine) -> Iterator[Answer]:
    """Whether torch.compile has the compiler that torch requires; a torch without CUDA requires none."""
    cuda, version = torch.version.cuda, package_version("triton")
    pins = [re.match(r"triton *\(?== *(\d+\.\d+)", line) for line in metadata.requires("torch") or ()]
    required = next((pin[1] for pin in pins if pin), None)
    install = f"pip install 'triton=={required}.*'" if required else "pip install triton"
    other = required and not f"{version}.".startswith(f"{required}.")
    yield (
        f"triton {version}" if version else "not installed",
        (cuda and not version, "broken", f"torch.compile and the kernels need it on a GPU: {install}"),
        (cuda and not required, "unknown", "this torch does not name the triton that it needs; nothing to do"),
        (other, "broken", f"torch {torch.__version__} came with {required} and may not compile: {install}"),
    )


@check("dtype")
def dtype(machine: Machine) -> Iterator[Answer]:
    choice = machine.dtype
    faster = "are clearly faster than in float32" if choice.name == "bfloat16" else "in bfloat16 are not clearly faster"
    why = f" (forward and backward of recipe small {faster} on this CPU)" if machine.best.type == "cpu" else ""
    old = machine.best.type == "cuda" and choice.dtype == torch.float32
    yield (
        f"a run computes in {choice.name}{why}",
        (old, "slow", "this GPU has no bfloat16: runs need --runtime.dtype float32"),
    )


@check("training speed")
def small_step(machine: Machine) -> Iterator[Answer]:
    """Forecast the time of a step of `small` on this CPU."""
    if machine.devices:
        return
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1  # both of the machine, also in a container
    step, most = probe.small_step(), probe.SMALL.schedule.max_seconds
    yield (
        f"recipe small: {step}, {most / step.seconds:,.0f} steps in its {most:.0f} s",
        (
            load > cpus,
            "slow",
            f"other processes use this machine (load {load:.1f} on {cpus} CPUs); stop them or wait",
        ),
        (most / step.seconds < 200, "slow", "too few to learn much: --recipe demo, or a larger --schedule.max-seconds"),
    )


@check("attention")
def attention(machine: Machine) -> Iterator[Answer]:
    selection = probe.choose_attention(machine.best, machine.dtype.dtype)
    refused = machine.best.type == "cuda" and {"cudnn", "flash"} <= selection.refused.keys()
    advice = "no fast backend passes its check: the GPU is older than sm_80, or reinstall torch"
    yield f"backend {selection}", (refused, "slow", advice)


@check("tuning")
def tune(machine: Machine) -> Iterator[Answer]:
    if machine.retune and machine.best.type == "cuda":
        tuning.tune(machine.best, command="golfgpt doctor --tune", say=machine.say)
        yield (f"kept in {tuning.tuned_file(machine.best)}",)
    elif machine.retune:
        yield ("nothing to tune: there is no GPU",)


@check("kernels")
def kernels(machine: Machine) -> Iterator[Answer]:
    """A row for each answer, with the kernels that give it."""
    ops: dict[tuple[str, str], list[str]] = {}
    for case in tuning.QUICK:
        ops.setdefault(implementation(case.op, machine.best, case.dtype), []).append(case.op)
    for (chosen, reason), names in ops.items():
        which, what = ", ".join(names) if len(ops) > 1 else "all ops", "PyTorch" if chosen == "eager" else chosen
        wrong, never = "failed its check" in reason, machine.best.type == "cuda" and "never measured" in reason
        yield (
            f"{which}: {what} ({reason})",
            (wrong, "slow", "wrong on this GPU and therefore not used: please report what --tune prints"),
            (never, "unknown", "golfgpt doctor --tune measures them here, in 50 s"),
        )
