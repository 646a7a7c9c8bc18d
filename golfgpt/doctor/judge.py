"""What is known of a machine as rows: name, value, verdict, and for every verdict but "ok" one sentence on what to do.

    ok        as it should be
    slow      works, at less than such a machine can do
    missing   not there; `broken` says that a run needs it
    unknown   could not be read or compared, or means what only a person can judge

The thresholds are judgements, none calibrated on a GPU that runs slowly.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from golfgpt.doctor.probe import THROTTLE, Choices, Failed, Gpu, why
from golfgpt.train.attention_backend import Selection


@dataclass(frozen=True)
class Row:
    name: str
    value: str
    advice: str = ""
    """One sentence, empty only where the verdict is ok."""
    verdict: Literal["ok", "slow", "missing", "unknown"] = "ok"
    broken: bool = False
    """A run needs what is missing."""


slow, missing, unknown = (partial(Row, verdict=verdict) for verdict in ("slow", "missing", "unknown"))
broken = partial(missing, broken=True)


def grade(name: str, value: str, *faults: tuple[object, Callable[..., Row], str]) -> Row:
    """The row of the first of (holds, verdict, advice) that holds; ok without one."""
    return next((verdict(name, value, advice) for holds, verdict, advice in faults if holds), Row(name, value))


REFUSED = {  # a failure that means more than that nothing is known
    "nvidia-smi": (unknown, "not available", "{}: clocks, power cap, throttling and links were not read"),
    "disk": (broken, "not writable", "runs are written here ({}): start elsewhere"),
    "all-reduce": (broken, "failed", "local processes cannot sum gradients, nor would a run (NCCL_DEBUG=INFO): {}"),
}


def refused(name: str, error: Exception) -> Row:
    if not isinstance(error, Failed | OSError):
        return unknown(name, "not checked", f"the check itself failed, please report it: {why(error)}")
    verdict, value, advice = REFUSED.get(name, (unknown, "not available", "it was not read: {}"))
    return verdict(name, value, advice.format(why(error)))


def usable(asked: str, *, build: str | None, seen: int, error: str | None, listed: int, visible: str | None) -> Row:
    """`build`: torch's CUDA version; `seen`: GPUs that compute under torch, `error`: why others do not; `listed`: those
    of nvidia-smi; `visible`: CUDA_VISIBLE_DEVICES."""
    name = "torch's GPUs"
    if asked == "cpu" or (seen and not error):
        return Row(name, f"{seen} usable" if seen else "not asked for")
    if asked == "auto" and not seen and (not listed or visible is not None):
        hidden = f", CUDA_VISIBLE_DEVICES={visible!r}" if listed else ""
        return Row(name, f"none{hidden}: runs use the CPU")
    if build is None:
        advice = "this torch was built for CPUs: install the CUDA build of the same version"
    elif not seen and visible is not None:
        advice = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it"
    elif error or listed:
        advice = f"torch (CUDA {build}) cannot use them ({error or 'it sees none'}): update the driver first"
    else:
        advice = "this machine shows no GPU: rent one, pass it to the container (--gpus all), or ask for the CPU"
    return broken(name, f"{seen} of {max(listed, seen)} usable", advice)


# Bits of NVML's nvmlClocksEventReasons; full clocks at the power cap are how these GPUs work, no reason to act.
TOO_HOT = "too hot for full clocks: improve the cooling or change the machine"
REASONS = {
    0x1: ("idle", ""),
    0x2: ("application clocks", "clocks were set below the maximum: sudo nvidia-smi -rac"),
    0x4: ("power cap", ""),
    0x8: ("hardware slowdown", "the board cuts its clock, for heat or its power supply: change the machine"),
    0x10: ("sync boost", "GPUs keep to the slowest one's clock: take them out of their sync boost group"),
    0x20: ("thermal slowdown", TOO_HOT),
    0x40: ("hardware thermal slowdown", TOO_HOT),
    0x80: ("power brake", "the power supply asks for less: change the machine"),
    0x100: ("display clocks", ""),
}


def span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{extreme(values):,.0f}" for extreme in (min, max)))


def which(flags: Sequence[object]) -> str:
    """The GPUs of which it is true, in words."""
    found = [str(i) for i, flag in enumerate(flags) if flag]
    if len(found) == len(flags):
        return "all GPUs" if len(flags) > 1 else "the GPU"
    return f"GPU{'s' if len(found) > 1 else ''} {', '.join(found)}"


def gpus(found: Sequence[Gpu], loaded: bool) -> list[Row]:
    """`loaded`: clocks and reasons were read while torch's GPUs computed, so that they mean something."""
    busy = [loaded and not gpu.get(THROTTLE, 0) & 0x1 for gpu in found]  # those hidden from torch stay idle
    rows = []
    for name, judged, *fields in (
        ("GPU", _names, "name"),
        ("driver", lambda name, found: Row(name, ", ".join(sorted(set(found)))), "driver_version"),
        ("SM clock", partial(_clock, busy), "clocks.sm", "clocks.max.sm"),
        ("power cap", _power, "power.limit", "power.default_limit"),
        ("throttling", partial(_throttling, loaded), THROTTLE),
    ):
        columns = [[gpu.get(field) for gpu in found] for field in fields]
        silent = unknown(name, "not available", "nvidia-smi does not say it of this GPU; nothing to do")
        rows.append(silent if any(None in column for column in columns) else judged(name, *columns))
    return rows


def _names(row: str, names: Sequence[str]) -> Row:
    counts = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    return grade(row, counts, (len(set(names)) > 1, slow, "every step waits for the slowest of them: use one kind"))


def _clock(busy: Sequence[bool], row: str, now: Sequence[float], top: Sequence[float]) -> Row:
    # A matrix product at full power takes a GPU to two thirds of its highest clock, which is no fault.
    low = [at_work and mhz < 0.55 * most for at_work, mhz, most in zip(busy, now, top, strict=True)]
    advice = f"{which(low)} far below the maximum under load: see throttling and power cap"
    value = f"{span(now)} of {span(top)} MHz{'' if all(busy) else ', idle'}"
    return grade(row, value, (any(low), slow, advice))


def _power(row: str, limits: Sequence[float], defaults: Sequence[float]) -> Row:
    capped = [limit < 0.99 * default for limit, default in zip(limits, defaults, strict=True)]
    lift = f"matrix products run slower: sudo nvidia-smi -pl {max(defaults):.0f} lifts it"
    advice = f"{which(capped)} may draw less than the default, {lift}"
    return grade(row, f"{span(limits)} W, default {span(defaults)} W", (any(capped), slow, advice))


def _throttling(loaded: bool, row: str, reasons: Sequence[int]) -> Row:
    met = [bit for bit in (1 << i for i in range(64)) if any(mask & bit for mask in reasons)]
    odd = "a reason that is not known here: nvidia-smi -q explains it"
    words = [REASONS.get(bit, (f"reason {bit:#x}", ""))[0] for bit in met]
    bad = [bit for bit in met if REASONS.get(bit, ("", ""))[1]]
    acts = [f"{which([mask & bit for mask in reasons])}: {REASONS[bit][1]}" for bit in bad]
    value = (", ".join(words) or "none") + ("" if loaded else " (not under load)")
    return grade(row, value, (acts, slow, "; ".join(dict.fromkeys(acts))), (set(met) - REASONS.keys(), unknown, odd))


def nvlink(links: Sequence[Sequence[float]]) -> Row:
    """`links`: of `parse_nvlink`, on a machine with several GPUs."""
    rates = [sum(rates) for rates in links]
    if not any(rates):
        advice = "gradients travel over PCIe: choose a machine with NVLink, or see that its fabric manager runs"
        return slow("NVLink", "no active links", advice)
    fewer = [rate < 0.99 * max(rates) for rate in rates]
    value = f"{span([len(rates) for rates in links])} links, {span(rates)} GB/s each way"
    advice = f"{which(fewer)} with fewer or slower links than others: change the machine"
    return grade("NVLink", value, (any(fewer), slow, advice))


# NVIDIA's datasheets of each product (H100, H200 and A100 Tensor Core GPU; where only "with sparsity" is printed, half
# of it) and, for the cards, the architecture white papers (Ada AD102, Ampere GA102). Keys are nvidia-smi's names.
DATASHEET = {  # TFLOP/s in bf16, dense, accumulated in fp32; GB/s
    "NVIDIA H100 80GB HBM3": (989, 3350), "NVIDIA H100 PCIe": (756, 2000), "NVIDIA H200": (989, 4800),
    "NVIDIA A100-SXM4-40GB": (312, 1555), "NVIDIA A100-SXM4-80GB": (312, 2039),
    "NVIDIA A100-PCIE-40GB": (312, 1555), "NVIDIA A100 80GB PCIe": (312, 1935),
    "NVIDIA GeForce RTX 4090": (165, 1008), "NVIDIA GeForce RTX 3090": (71, 936),
}  # fmt: skip
# Of the datasheet's figure: 788 of 989 TFLOP/s and 4.3 of 4.8 TB/s were seen on an H200, at larger sizes.
LEAST_SHARE = (0.55, 0.7)


def roofs(gpu: str, measured: Sequence[tuple[float, float]]) -> list[Row]:
    """`measured` of each usable GPU; `gpu` is what they are."""
    rows = []
    for i, (name, unit) in enumerate((("matrix product", "TFLOP/s"), ("memory copy", "GB/s"))):
        speeds, least, best = [both[i] for both in measured], LEAST_SHARE[i], DATASHEET.get(gpu, (0, 0))[i]
        low = [speed < least * best for speed in speeds]
        share = f", {min(speeds) / best:.0%} of the datasheet's {best:,.0f}" if best else ""
        advice = f"{which(low)} below {least:.0%}: see throttling and power cap, else change the machine"
        new = (not best, unknown, "no datasheet figure is known here for this GPU: compare it with the vendor's")
        rows.append(grade(name, f"{span(speeds)} {unit}{share}", new, (any(low), slow, advice)))
    return rows


def all_reduce(processes: int, backend: str, gbps: float, links: Sequence[Sequence[float]] = ()) -> Row:
    """`links`: as of `nvlink`, where the processes could use them."""
    least = 0.25 * max(map(sum, links), default=0) or 5
    advice = f"below {least:.0f} GB/s: NCCL_DEBUG=INFO names the path that NCCL takes"
    value = f"{gbps:,.1f} GB/s, {processes} processes, 64 MB, {backend}"
    return grade("all-reduce", value, (backend == "nccl" and gbps < least, slow, advice))


def step(ms: float | None, expected: Mapping[str, Any] | None, torch_version: str) -> Row:
    name = "baseline step"
    if ms is None:
        return unknown(name, "not measured", "there is no GPU: on one this compares with what was measured on its kind")
    value = f"eager forward + backward {ms:.1f} ms"
    if expected is None:
        value += "; no committed measurement for this GPU"
        return unknown(name, value, "nothing to compare with, and nothing to do")
    value += f", expected {expected['eager']:.1f}; golfgpt's whole step {expected['golfgpt']:.1f} ({expected['date']})"
    other = "" if expected["torch"] == torch_version else f", which torch {expected['torch']} took"
    times = f"{ms / expected['eager']:.2f} x the time of the committed measurement{other}"
    advice = f"{times}: see throttling, power cap, matrix product and CPUs"
    return grade(name, value, (ms > 1.15 * expected["eager"], slow, advice))


def disk(free: int, speed: float) -> Row:
    # Two checkpoints of 26 M parameters with optimizer state, and one being written.
    full = (free < 1e9, broken, "a run's checkpoints take up to 1 GB: free some, or start elsewhere")
    lame = (speed < 50e6, slow, "a checkpoint of 0.3 GB takes many seconds: run on a local disk")
    return grade("disk", f"{free / 1e9:,.1f} GB free, writes {speed / 1e6:,.0f} MB/s", full, lame)


def cpus(available: int, installed: int, quota: float | None, gpus: int) -> Row:
    time = quota or available
    few = f"two for each GPU, its process and its data, make {2 * gpus}: ask for more"
    many = f"torch starts {available} threads and is stopped: --runtime.threads {max(1, int(time))}"
    value = f"{available} of {installed}" + (f", the time of {quota:.1f}" if quota else "")
    return grade("CPUs", value, (min(available, time) < 2 * gpus, slow, few), (time < available, slow, many))


def memory(total: int, available: int) -> Row:
    advice = "the smallest run, the demo, takes 0.9 GB: end something else"
    value = f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available"
    return grade("memory", value, (available < 1e9, broken, advice))


def shared_memory(status: os.statvfs_result, gpus: int) -> Row:
    """Local processes need it for NCCL, one does without. A container gets 64 MB unless it is told otherwise."""
    advice = "little for NCCL and for DataLoader workers, who die of it: --shm-size 8g"
    size = status.f_blocks * status.f_frsize
    return grade("/dev/shm", f"{size / 1e9:.2f} GB", (size < 1e9, missing if gpus > 1 else unknown, advice))


# The triton that the CUDA wheel of each torch requires, by the wheels' own metadata.
TORCH_TRITON = {
    "2.10": "3.6", "2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9",
}  # fmt: skip
PACKAGES = {  # the verdict, and what is lost without them
    "brotli": (broken, "artifacts of most runs can be neither written nor read"),
    "zstandard": (broken, "text cannot be prepared and runs cannot be scored"),
    "huggingface_hub": (missing, "published data cannot be downloaded"),
    "tyro": (broken, "no command can be given"),
}


def versions(found: Mapping[str, Any]) -> list[Row]:
    """`found`: of `probe.versions`."""
    parts = [f"{part} {found[part]}" for part in ("golfgpt", "python", "CUDA", "cuDNN", "NCCL") if found.get(part)]
    new = f"newer than {[*TORCH_TRITON][-1]}, the last that golfgpt was tried with; nothing to do until something fails"
    rows = [Row("versions", ", ".join(parts)), triton(found["torch"], found.get("triton"), found["CUDA"])]
    rows.append(grade("torch", found["torch"], (release(found["torch"]) not in TORCH_TRITON, unknown, new)))
    for name, (verdict, lost) in PACKAGES.items():
        here = found.get(name)
        rows.append(grade(name, here or "not installed", (not here, verdict, f"without it {lost}: pip install {name}")))
    return rows


def release(version: str) -> str:
    """ "2.13.0+cu130" -> "2.13"."""
    return ".".join(version.split(".")[:2])


def triton(torch: str, version: str | None, cuda: str | None) -> Row:
    """Whether torch.compile has the compiler that it was released with. A torch without CUDA compiles without it."""
    required, wrong = TORCH_TRITON.get(release(torch)), broken if cuda else unknown
    pin = f"pip install 'triton{f'=={required}.*' if required else ''}'"
    if version is None:
        return wrong("triton", "not installed", f"torch.compile and the kernels need it on a GPU: {pin}")
    new = (required is None, unknown, f"what torch {torch} needs is not known here; nothing to do")
    other = f"torch {torch} came with {required} and may not compile: {pin}"
    return grade("triton", version, new, (not version.startswith(f"{required}."), wrong, other))


def attention(dtype: str, selection: Selection, cuda: bool) -> Row:
    value = f"{dtype}: {selection}"
    old = (cuda and dtype == "float32", slow, "no bfloat16 on this GPU: runs need --runtime.dtype float32, slower")
    none = "no fast backend passes its check: a GPU older than sm_80, or reinstall torch"
    return grade("attention", value, old, (cuda and {"cudnn", "flash"} <= selection.refused.keys(), slow, none))


def kernels(choices: Choices, cuda: bool) -> list[Row]:
    """One for each answer, with the kernels that give it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for op, choice in choices.items():
        groups.setdefault(choice, []).append(op)
    rows = []
    for (chosen, reason), ops in groups.items():
        value = f"{f'all {len(ops)}' if len(groups) == 1 else ', '.join(ops)}: {chosen} ({reason})"
        wrong = "wrong on this GPU and therefore not used: please report what --tune prints"
        never = (cuda and "never measured" in reason, unknown, "golfgpt doctor --tune measures them here, in 50 s")
        rows.append(grade("kernels", value, ("failed its check" in reason, slow, wrong), never))
    return rows


def tuned(result: tuple[Choices, Choices, Path] | None) -> Row:
    """`result`: of `probe.tune`."""
    if result is None:
        return Row("tuning", "nothing to tune: there is no GPU")
    before, after, file = result
    changed = [f"{op} {before[op][0]} -> {new}" for op, (new, _) in after.items() if new != before[op][0]]
    return Row("tuning", f"{'changed: ' if changed else 'nothing changed'}{', '.join(changed)}; kept in {file}")
