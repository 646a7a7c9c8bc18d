"""What this machine is, how fast it runs, and what keeps a run from starting or from being fast.

A row is one check: name, value, verdict, and for every verdict but "ok" one sentence on what is wrong and what to do.

    ok        as it should be
    slow      works, at less than such a machine can do
    missing   not there; `broken` says that a run needs it
    unknown   could not be read or compared, or means what only a person can judge

Functions that parse and judge take what was read and touch nothing, so that recorded output of nvidia-smi tests them;
functions that probe read the machine: nvidia-smi, /proc, the cgroup files, torch.

The thresholds are judgements, none calibrated on a GPU that runs slowly. `LEAST_SHARE` of a datasheet's figure leaves
room for what products and copies reach: 788 of 989 TFLOP/s and 4.3 of 4.8 TB/s were seen on an H200, at larger sizes.
"""

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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from golfgpt_kernels import implementation, tuning
from torch.nn.attention import sdpa_kernel

import golfgpt
from golfgpt import attention, distributed, recipes
from golfgpt.errors import InputError
from golfgpt.report import table

ABSENT = "not available"


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


def exit_code(rows: Iterable[Row]) -> int:
    """3 where a run could not work, else 0."""
    return 3 if any(row.broken for row in rows) else 0


def text(rows: Sequence[Row]) -> str:
    """The table, and below it the sentence of each row that is not ok; what a run needs comes first."""
    lines = [table(("check", "value", "verdict"), [(row.name, row.value, row.verdict) for row in rows]), ""]
    for row in sorted(rows, key=lambda row: (not row.broken, row.verdict == "unknown")):
        if row.verdict != "ok":
            lines.append(f"{row.name}{' (a run needs it)' if row.broken else ''}: {row.advice}")
    counts = Counter(row.verdict for row in rows)
    return "\n".join([*lines, ", ".join(f"{counts[v]} {v}" for v in ("ok", "slow", "missing", "unknown"))])


# ---- asking other programs


class Failed(Exception):
    """A program does not answer; the message says why in a few words."""


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of `command`. Raises Failed when it is not there or does not end in time.

    What hangs is killed with its children and not waited for: a driver in trouble leaves processes that cannot die.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True, env=environment,
        )  # fmt: skip
    except OSError as error:
        raise Failed(f"{command[0]} cannot be run: {error.strerror}") from error
    try:
        out, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"{Path(command[0]).name} gave no answer in {seconds:.0f} s") from None
        raise
    return process.returncode, out


def answer(probe: Callable[..., Any], *arguments: Any) -> Any:
    """What `probe` returns, or as a string the reason for which it fails."""
    try:
        return probe(*arguments)
    except Failed as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


# ---- nvidia-smi: what it says


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi sees it; None for what it does not say, or says in words that were not expected."""

    name: str | None = None
    driver: str | None = None
    memory_mib: float | None = None
    used_mib: float | None = None
    sm_mhz: float | None = None
    max_sm_mhz: float | None = None
    memory_mhz: float | None = None
    max_memory_mhz: float | None = None
    limit_watts: float | None = None
    default_watts: float | None = None
    celsius: float | None = None
    reasons: int | None = None
    """Bits of NVML's nvmlClocksEventReasons: why the clock is not higher."""
    ecc: str | None = None
    ecc_errors: float | None = None
    """Uncorrected ones since the driver was loaded."""


def _word(cell: str) -> str | None:
    return None if not cell or cell.startswith("[") or cell == "N/A" else cell


def _number(cell: str) -> float | None:
    return float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell, re.ASCII) else None


def _bits(cell: str) -> int | None:
    return int(cell, 16) if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", cell) else None


# Each field of Gpu: how a cell is read, and its names in --query-gpu, the newest first.
QUERY: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "name": (_word, ("name",)),
    "driver": (_word, ("driver_version",)),
    "memory_mib": (_number, ("memory.total",)),
    "used_mib": (_number, ("memory.used",)),
    "sm_mhz": (_number, ("clocks.sm",)),
    "max_sm_mhz": (_number, ("clocks.max.sm",)),
    "memory_mhz": (_number, ("clocks.mem",)),
    "max_memory_mhz": (_number, ("clocks.max.mem",)),
    "limit_watts": (_number, ("power.limit",)),
    "default_watts": (_number, ("power.default_limit",)),
    "celsius": (_number, ("temperature.gpu",)),
    "reasons": (_bits, ("clocks_event_reasons.active", "clocks_throttle_reasons.active")),
    "ecc": (_word, ("ecc.mode.current",)),
    "ecc_errors": (_number, ("ecc.errors.uncorrected.volatile.total",)),
}
assert list(QUERY) == [field.name for field in fields(Gpu)]
SMI_SECONDS = 20  # without persistence mode the driver is loaded anew, which takes a second or more for each GPU


def parse_query(output: str, asked: Sequence[str] = tuple(QUERY)) -> list[Gpu]:
    """One Gpu per line of `--format=csv,noheader,nounits`. Raises ValueError for lines of another shape."""
    gpus = []
    for line in filter(None, map(str.strip, output.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(asked):
            raise ValueError(f"nvidia-smi printed {line[:80]!r}, where {len(asked)} values were asked for")
        gpus.append(Gpu(**{name: QUERY[name][0](cell) for name, cell in zip(asked, cells, strict=True)}))
    return gpus


def parse_nvlink(output: str) -> list[list[float]]:
    """GB/s of each active link of each GPU, one direction, from `nvidia-smi nvlink --status`."""
    gpus: list[list[float]] = []
    for line in map(str.strip, output.splitlines()):
        if re.match(r"GPU \d+:", line):
            gpus.append([])
        elif gpus and (found := re.fullmatch(r"Link \d+: (\d+(?:\.\d+)?) GB/s", line)):
            gpus[-1].append(float(found[1]))
    return gpus


def query_gpus() -> list[Gpu]:
    """All GPUs of the machine, also those hidden from torch. Raises Failed, or ValueError for odd output.

    One unknown field makes nvidia-smi refuse the whole query: it is asked for by its older name, then not at all.
    """
    names = {field: list(aliases) for field, (_, aliases) in QUERY.items()}
    while True:
        asked = {field: aliases[0] for field, aliases in names.items() if aliases}
        query = ["nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader,nounits"]
        code, out = run(query, SMI_SECONDS)
        if code == 0:
            return [] if "No devices were found" in out else parse_query(out, tuple(asked))
        refused = re.search(r'Field "([^"]+)" is not a valid field', out)
        field = next((field for field, name in asked.items() if refused and name == refused[1]), None)
        if field is None or len(asked) == 1:
            raise Failed(f"nvidia-smi exits with {code}: {_head(out)}")
        names[field].pop(0)


def query_nvlink(gpus: int) -> list[list[float]]:
    """As parse_nvlink; no links for each of `gpus` where nvidia-smi has nothing to say. Raises Failed."""
    code, out = run(["nvidia-smi", "nvlink", "--status"], SMI_SECONDS)
    if code:
        raise Failed(f"nvidia-smi nvlink exits with {code}: {_head(out)}")
    return parse_nvlink(out) or [[]] * gpus


def _head(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[0][:120]


# ---- nvidia-smi: what that means

# Full clocks at the power cap are how these GPUs work: no reason to act.
IDLE = 0x1
HARMLESS = {IDLE: "idle", 0x4: "power cap", 0x100: "display clocks"}
TOO_HOT = "too hot for full clocks: improve the cooling or change the machine"
THROTTLES = {
    0x2: ("application clocks", "clocks were set below the maximum: sudo nvidia-smi -rac"),
    0x8: ("hardware slowdown", "the board cuts its clock, for heat or its power supply: change the machine"),
    0x10: ("sync boost", "GPUs keep to the slowest one's clock: take them out of their sync boost group"),
    0x20: ("thermal slowdown", TOO_HOT),
    0x40: ("hardware thermal slowdown", TOO_HOT),
    0x80: ("power brake", "the power supply asks for less: change the machine"),
}


def span(values: Sequence[float], unit: str) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return f"{low if low == high else f'{low} to {high}'} {unit}"


def which(flags: Sequence[bool]) -> str:
    """The GPUs of which it is true, in words."""
    found = [str(i) for i, flag in enumerate(flags) if flag]
    if len(found) == len(flags):
        return "all GPUs" if len(flags) > 1 else "the GPU"
    return f"GPU{'s' if len(found) > 1 else ''} {', '.join(found)}"


def gpu_rows(gpus: Sequence[Gpu], *, loaded: bool) -> list[Row]:
    """`loaded`: clocks, temperature and reasons were read while torch's GPUs computed, so that they mean something."""

    def row(name: str, judge: Callable[..., Row], *needed: str) -> Row:
        columns = [[getattr(gpu, field) for gpu in gpus] for field in needed]
        if any(None in column for column in columns):
            return unknown(name, ABSENT, "nvidia-smi does not say it of this GPU; nothing to do")
        return judge(name, *columns)

    # GPUs hidden from torch stay idle.
    busy = [loaded and not (gpu.reasons or 0) & IDLE for gpu in gpus]
    return [
        row("GPU", _names, "name"),
        row("GPU memory", _memory, "memory_mib", "used_mib"),
        row("driver", lambda name, versions: Row(name, ", ".join(sorted(set(versions)))), "driver"),
        row("SM clock", partial(_clock, busy=busy), "sm_mhz", "max_sm_mhz"),
        row("memory clock", partial(_clock, busy=busy), "memory_mhz", "max_memory_mhz"),
        row("power cap", _power, "limit_watts", "default_watts"),
        row("temperature", lambda name, celsius: Row(name, span(celsius, "°C")), "celsius"),
        row("throttling", partial(_throttling, loaded=loaded), "reasons"),
        row("ECC", partial(_ecc, errors=[gpu.ecc_errors or 0 for gpu in gpus]), "ecc"),
    ]


def _names(row: str, names: Sequence[str]) -> Row:
    counts = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    if len(set(names)) > 1:
        return slow(row, counts, "every step waits for the slowest of them: use one kind")
    return Row(row, counts)


def _memory(row: str, total: Sequence[float], used: Sequence[float]) -> Row:
    value = f"{span(total, 'MiB')}, {span(used, 'MiB')} in use"
    taken = [mine > 0.05 * all_ for mine, all_ in zip(used, total, strict=True)]
    if any(taken):
        return slow(row, value, f"something holds memory of {which(taken)} and may compute: nvidia-smi names it")
    return Row(row, value)


def _clock(row: str, now: Sequence[float], top: Sequence[float], busy: Sequence[bool]) -> Row:
    value = f"{span(now, 'MHz')} of {span(top, 'MHz')}{'' if all(busy) else ', idle'}"
    # A matrix product at full power takes a GPU to two thirds of its highest clock, which is no fault.
    low = [at_work and mhz < 0.55 * most for at_work, mhz, most in zip(busy, now, top, strict=True)]
    if any(low):
        return slow(row, value, f"{which(low)} far below the maximum under load: see throttling and power cap")
    return Row(row, value)


def _power(row: str, limits: Sequence[float], defaults: Sequence[float]) -> Row:
    value = f"{span(limits, 'W')}, default {span(defaults, 'W')}"
    capped = [limit < 0.99 * default for limit, default in zip(limits, defaults, strict=True)]
    if any(capped):
        lift = f"sudo nvidia-smi -pl {max(defaults):.0f} lifts it"
        return slow(row, value, f"{which(capped)} may draw less than the default, matrix products run slower: {lift}")
    return Row(row, value)


def _throttling(row: str, reasons: Sequence[int], loaded: bool) -> Row:
    met = {bit for bit in (1 << i for i in range(64)) if any(mask & bit for mask in reasons)}
    named = HARMLESS | {bit: word for bit, (word, _) in THROTTLES.items()}
    value = ", ".join(named.get(bit, f"reason {bit:#x}") for bit in sorted(met)) or "none"
    value += "" if loaded else " (not under load)"
    advice = [
        f"{which([bool(r & bit) for r in reasons])}: {THROTTLES[bit][1]}" for bit in sorted(met & THROTTLES.keys())
    ]
    if advice:
        return slow(row, value, "; ".join(dict.fromkeys(advice)))
    if met - named.keys():
        return unknown(row, value, "a reason that is not known here: nvidia-smi -q explains it")
    return Row(row, value)


def _ecc(row: str, modes: Sequence[str], errors: Sequence[float]) -> Row:
    value = ", ".join(sorted({mode.lower() for mode in modes}))
    if any(errors):
        bad = which([error > 0 for error in errors])
        value += f", {span(errors, 'uncorrected errors')}"
        return unknown(row, value, f"memory of {bad} failed, results may be wrong: change the machine")
    return Row(row, value)


def nvlink_row(links: Sequence[Sequence[float]]) -> Row:
    """`links`: of `parse_nvlink`, on a machine with several GPUs."""
    rates = [sum(rates) for rates in links]
    if not any(rates):
        advice = "gradients travel over PCIe: choose a machine with NVLink, or see that its fabric manager runs"
        return slow("NVLink", "no active links", advice)
    value = f"{span([len(rates) for rates in links], 'links')}, {span(rates, 'GB/s')} each way"
    fewer = [rate < 0.99 * max(rates) for rate in rates]
    if any(fewer):
        return slow("NVLink", value, f"{which(fewer)} with fewer or slower links than others: change the machine")
    return Row("NVLink", value)


# ---- torch and its GPUs


def usable_row(asked: str, *, build: str | None, seen: int, error: str | None, listed: int, visible: str | None) -> Row:
    """`build`: torch's CUDA version; `seen`: GPUs that compute under torch, `error`: why others do not; `listed`: those
    of nvidia-smi; `visible`: CUDA_VISIBLE_DEVICES."""
    name = "torch's GPUs"
    if asked == "cpu":
        return Row(name, "not asked for")
    if seen and not error:
        return Row(name, f"{seen} usable")
    if asked == "auto" and not seen and (not listed or visible is not None):
        hidden = f", CUDA_VISIBLE_DEVICES={visible!r}" if listed else ""
        return Row(name, f"none{hidden}: runs use the CPU")
    if build is None:
        advice = "this torch was built for CPUs: install the CUDA build of the same version"
    elif not seen and visible is not None:
        advice = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it"
    elif error:
        advice = f"torch (CUDA {build}) cannot use them ({error}): often the driver is older than that CUDA, update it"
    elif not listed:
        advice = "this machine shows no GPU: rent one, pass it to the container (--gpus all), or ask for the CPU"
    else:
        advice = f"nvidia-smi lists {listed} and torch (CUDA {build}) sees none: update the driver"
    return broken(name, f"{seen} of {max(listed, seen)} usable", advice)


def usable_gpus(asked: str) -> tuple[list[torch.device], str | None]:
    """GPUs that compute, and why others do not."""
    devices, error = [], None
    if asked == "cpu" or torch.version.cuda is None:
        return devices, error
    try:
        torch.cuda.init()
    except Exception as caught:
        return devices, None if "No CUDA GPUs are available" in str(caught) else first_line(caught)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            torch.ones(8, device=device).sum().item()
            devices.append(device)
        except Exception as caught:
            error = f"GPU {index}: {first_line(caught)}"
    return devices, error


def bfloat16_row(gpus: int, supported: bool, amx: bool) -> Row:
    if gpus and not supported:
        return slow("bfloat16", "not on this GPU", "runs need --runtime.dtype float32, which is slower")
    return Row("bfloat16", "on the GPU" if gpus else "CPU with AMX" if amx else "CPU without AMX: float32 is used")


def has_amx() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


# ---- speed of a GPU


class Roof(NamedTuple):
    tflops: float  # bf16, dense, accumulated in fp32
    gbps: float


# NVIDIA's datasheets of each product (H100, H200 and A100 Tensor Core GPU; where only "with sparsity" is printed, half
# of it) and, for the cards, the architecture white papers (Ada AD102, Ampere GA102). Keys are nvidia-smi's names.
DATASHEET = {
    "NVIDIA H100 80GB HBM3": Roof(989, 3350),
    "NVIDIA H100 PCIe": Roof(756, 2000),
    "NVIDIA H200": Roof(989, 4800),
    "NVIDIA A100-SXM4-40GB": Roof(312, 1555),
    "NVIDIA A100-SXM4-80GB": Roof(312, 2039),
    "NVIDIA A100-PCIE-40GB": Roof(312, 1555),
    "NVIDIA A100 80GB PCIe": Roof(312, 1935),
    "NVIDIA GeForce RTX 4090": Roof(165, 1008),
    "NVIDIA GeForce RTX 3090": Roof(71, 936),
}
LEAST_SHARE = Roof(0.55, 0.7)


def roof_rows(gpu: str, measured: Sequence[Roof]) -> list[Row]:
    """`measured` of each usable GPU; `gpu` is what they are."""
    return [
        _roof_row(name, unit, [roof[i] for roof in measured], DATASHEET[gpu][i] if gpu in DATASHEET else None, share)
        for i, (name, unit, share) in enumerate(
            (("matrix product", "TFLOP/s", LEAST_SHARE.tflops), ("memory copy", "GB/s", LEAST_SHARE.gbps))
        )
    ]


def _roof_row(name: str, unit: str, measured: Sequence[float], datasheet: float | None, least: float) -> Row:
    value = span(measured, unit)
    if datasheet is None:
        return unknown(name, value, "no datasheet figure is known here for this GPU: compare it with the vendor's")
    value += f", {min(measured) / datasheet:.0%} of the datasheet's {datasheet:,.0f}"
    low = [speed < least * datasheet for speed in measured]
    if any(low):
        why = "see throttling, power cap and memory in use, else change the machine"
        return slow(name, value, f"{which(low)} below {least:.0%}: {why}")
    return Row(name, value)


def measure_roof(device: torch.device) -> Roof:
    """A bf16 product of 4096 x 4096 x 4096 on random data (zeros run faster); a copy of 1 GiB, or of a sixteenth of the
    free memory, bytes read plus bytes written."""
    size, count = 4096, min(2**28, torch.cuda.mem_get_info(device)[0] // 16)
    with torch.cuda.device(device):
        pairs = [{n: torch.randn(size, size, device=device, dtype=torch.bfloat16) for n in "ab"} for _ in range(3)]
        product = tuning.time_us(lambda i: i["a"] @ i["b"], pairs, device)
        vectors = {n: torch.randn(count, device=device) for n in "ab"}
        copy = tuning.time_us(lambda i: i["a"].copy_(i["b"]), [vectors], device)
    return Roof(2 * size**3 / product.us / 1e6, 2 * 4 * count / copy.us / 1e3)


def under_load(devices: Sequence[torch.device], roofs: Sequence[Roof], read: Callable[[], list[Gpu]]) -> list[Gpu]:
    """What `read` says while every GPU has two seconds of matrix products before it."""
    size = 8192
    for device, roof in zip(devices, roofs, strict=True):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
        for _ in range(min(900, int(2 * roof.tflops * 1e12 / (2 * size**3)))):  # a queue holds about 1000 launches
            a @ b
    gpus = read()
    for device in devices:
        torch.cuda.synchronize(device)
    return gpus


def loaded_rows(listed: Sequence[Gpu], devices: Sequence[torch.device], roofs: Sequence[Roof]) -> list[Row]:
    """Memory in use as it was before this process took any; clocks and reasons under load, where there can be one."""
    if not roofs:
        return gpu_rows(listed, loaded=False)
    moving = ("sm_mhz", "memory_mhz", "celsius", "reasons")
    pairs = zip(listed, under_load(devices, roofs, query_gpus), strict=True)
    return gpu_rows([replace(then, **{f: getattr(now, f) for f in moving}) for then, now in pairs], loaded=True)


# ---- a step


class Step(NamedTuple):
    ms: float
    tokens: int


STEP_TOKENS = 65_536  # one of eight ranks' share of the baseline's step, as in bench/step.py
RESULTS = Path(golfgpt.__file__).parent.parent / "bench" / "results"


def expected_step(gpu: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest committed measurement of the baseline's step on this kind of GPU, from `bench.step`'s files:
    {"eager": ms of eager's forward and backward, "golfgpt": ms of golfgpt's whole step, "torch", "date"}."""
    found = []
    for file in folder.glob("step-*.json"):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            forms = next(entry for entry in result["entries"] if entry["recipe"] == "baseline")["forms"]
            eager = forms["eager"]["ms"]["forward"] + forms["eager"]["ms"]["backward"]
            if result["gpu"] == gpu and not result["small"]:
                this = {"eager": eager, "golfgpt": forms["golfgpt"]["ms"]["step"]}
                found.append(this | {name: result[name] for name in ("torch", "date")})
        except (KeyError, StopIteration, TypeError, ValueError):
            continue  # unfinished, or of another version
    return max(found, key=lambda this: this["date"], default=None)


def measure_step(device: torch.device) -> Step:
    """Forward and backward of the baseline as bench.step's form "eager" takes them: bf16, not compiled, no optimizer.

    The median of five after two warm-ups, over the tokens of a rank, or as large a power of two of them as fits.
    """
    from golfgpt.model import GPT

    config, tokens = recipes.get("baseline").config, STEP_TOKENS
    model = GPT(config.model).to(device)
    with sdpa_kernel(list(attention.BACKENDS.values())):
        attention.select_backend("auto", config.model, [config.data.seq_len], device, torch.bfloat16)
        while True:
            try:
                return Step(_time_steps(model, tokens, config.data.seq_len, device), tokens)
            except torch.OutOfMemoryError:
                if tokens == config.data.seq_len:
                    raise
            tokens //= 2
            torch.cuda.empty_cache()


def _time_steps(model: torch.nn.Module, tokens: int, seq_len: int, device: torch.device) -> float:
    ids = torch.randint(model.config.vocab_size, (2, tokens // seq_len, seq_len), device=device)
    times = []
    for _ in range(7):
        model.zero_grad(set_to_none=True)
        _wait(device)
        start = time.perf_counter()
        model.loss(ids[0], ids[1], dtype=torch.bfloat16).backward()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_row(measured: Step | None, expected: Mapping[str, Any] | None, torch_version: str) -> Row:
    """Time is proportional to tokens once the GPU is full; what was measured with fewer is scaled, and says so."""
    name = "baseline step"
    if measured is None:
        return unknown(name, "not measured", "there is no GPU: on one this compares with the figures in bench/results")
    share = STEP_TOKENS / measured.tokens
    ms = measured.ms * share
    value = f"eager forward + backward {ms:.1f} ms"
    if share > 1:
        value += f" ({share:.0f} x the time of {measured.tokens:,} tokens, more do not fit)"
    if expected is None:
        value += "; no committed measurement for this GPU"
        return unknown(name, value, "nothing to compare with: `make gpu-step` measures this GPU")
    value += f", expected {expected['eager']:.1f}; golfgpt's whole step {expected['golfgpt']:.1f} ({expected['date']})"
    if ms > 1.15 * expected["eager"]:
        other = "" if expected["torch"] == torch_version else f", which torch {expected['torch']} took"
        why = f"{ms / expected['eager']:.2f} x the time of the committed measurement{other}"
        return slow(name, value, f"{why}: see throttling, power cap, matrix product and CPUs")
    return Row(name, value)


def measured_step(device: torch.device) -> Row:
    if device.type != "cuda":
        return step_row(None, None, torch.__version__)
    return step_row(measure_step(device), expected_step(torch.cuda.get_device_name(device)), torch.__version__)


# ---- processes together


ALL_REDUCE_BYTES = 64_000_000


class AllReduce(NamedTuple):
    processes: int
    backend: str
    gbps: float  # 2 (n - 1) / n of the bytes over the time: comparable with a link's rate for any n


def all_reduce(device: str, processes: int) -> AllReduce:
    """Sum 64 MB over local processes, started as a run starts them. Raises Failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    torch.cuda.empty_cache()  # what was measured before left memory to this process
    code, out = run([*command, "-m", "golfgpt.doctor", device], 60, environment)
    told = [line for line in out.splitlines() if line.startswith("all-reduce ")]
    if code or not told:
        errors = filter(re.compile(r"[\w.]+Error: \S|NCCL WARN").search, out.splitlines())
        raise Failed(next(errors, f"exit code {code}")[:200])
    return AllReduce(**json.loads(told[-1].removeprefix("all-reduce ")))


def all_reduce_rank(device: str) -> None:
    """What each process of `all_reduce` runs."""
    ranks, times = distributed.start(device), []
    try:
        for _ in range(8):
            values = torch.ones(ALL_REDUCE_BYTES // 4, device=ranks.device)
            _wait(ranks.device)
            start = time.perf_counter()
            ranks.sum_(values)
            _wait(ranks.device)
            times.append(time.perf_counter() - start)
            if not (values == ranks.world).all():
                raise ArithmeticError("the all-reduce gave a wrong sum")
        gbps = 2 * (ranks.world - 1) / ranks.world * ALL_REDUCE_BYTES / median(times[3:]) / 1e9
        result = AllReduce(ranks.world, torch.distributed.get_backend(), gbps)
        if ranks.main:
            print("all-reduce", json.dumps(result._asdict()), flush=True)
    finally:
        ranks.close()


def all_reduce_row(result: AllReduce | str, links: float = 0.0) -> Row:
    """`result`: the measurement, or why there is none; `links`: GB/s of a GPU's NVLinks together, one direction."""
    name = "all-reduce"
    if isinstance(result, str):
        advice = (
            f"local processes cannot sum gradients ({result}), nor would a run: NCCL_DEBUG=INFO torchrun … says more"
        )
        return broken(name, "failed", advice)
    value = f"{result.gbps:,.1f} GB/s, {result.processes} processes, 64 MB, {result.backend}"
    least = 0.25 * links or 5.0
    if result.backend == "nccl" and result.gbps < least:
        return slow(name, value, f"below {least:.0f} GB/s: NCCL_DEBUG=INFO names the path that NCCL takes")
    return Row(name, value)


# ---- disk, processors, memory


def probe_disk(folder: Path, size: int = 64_000_000) -> tuple[int, float]:
    """(bytes free, bytes a second of writing and fsync), by a file without a name that goes when it is closed.
    Raises OSError."""
    part = os.urandom(1_000_000)  # a file system that compresses would swallow zeros
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(size // len(part)):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize, size / seconds


def disk_row(folder: Path, result: tuple[int, float] | str) -> Row:
    """`result`: that of probe_disk, or its error."""
    if isinstance(result, str):
        return broken("disk", "not writable", f"runs are written to {folder} ({result}): start elsewhere")
    free, speed = result
    value = f"{free / 1e9:,.1f} GB free, writes {speed / 1e6:,.0f} MB/s"
    if free < 1e9:  # two checkpoints of 26 M parameters with optimizer state, and one being written
        return broken("disk", value, "a run's checkpoints take up to 1 GB: free some, or start elsewhere")
    if speed < 50e6:
        return slow("disk", value, "a checkpoint of 0.3 GB takes many seconds: run on a local disk")
    return Row("disk", value)


def parse_cpu_max(content: str) -> float | None:
    """CPUs of a cgroup's cpu.max ("max 100000" or "150000 100000"); None without a limit or for anything else."""
    found = re.fullmatch(r"(\d+) ([1-9]\d*)\s*", content, re.ASCII)
    return int(found[1]) / int(found[2]) if found else None


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The tightest limit on this process's cgroup and those above it, of either version; None without one."""
    limits = []
    for line in _read(own).splitlines():
        number, controllers, path = line.split(":", 2)
        folder = Path(path.lstrip("/"))
        for here in (folder, *folder.parents):
            if number == "0":
                limits.append(parse_cpu_max(_read(root / here / "cpu.max")))
            elif "cpu" in controllers.split(","):
                us, period = (_read(root / "cpu" / here / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
                limits.append(parse_cpu_max(f"{us} {period}"))
    return min(filter(None, limits), default=None)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_row(available: int, installed: int, quota: float | None, gpus: int) -> Row:
    value = f"{available} of {installed}" + ("" if quota is None else f", the time of {quota:.1f}")
    if min(available, quota or available) < 2 * gpus:
        return slow("CPUs", value, f"two for each GPU, its process and its data, make {2 * gpus}: ask for more")
    if quota is not None and quota < available:
        threads = max(1, int(quota))
        return slow("CPUs", value, f"torch starts {available} threads and is stopped: --runtime.threads {threads}")
    return Row("CPUs", value)


def parse_meminfo(content: str) -> tuple[int, int] | None:
    """(total, available) bytes of /proc/meminfo."""
    found = dict(re.findall(r"^(MemTotal|MemAvailable): +(\d+) kB$", content, re.MULTILINE))
    return (1024 * int(found["MemTotal"]), 1024 * int(found["MemAvailable"])) if len(found) == 2 else None


def memory_row(memory: tuple[int, int] | None) -> Row:
    if memory is None:
        return unknown("memory", ABSENT, "/proc/meminfo cannot be read; nothing to do")
    total, available = memory
    value = f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available"
    if available < 1e9:
        return broken("memory", value, "the smallest run, the demo, takes 0.9 GB: end something else")
    return Row("memory", value)


def shared_memory_row(status: os.statvfs_result | str, gpus: int) -> Row:
    """NCCL exchanges data between local processes in /dev/shm, and so do the workers of a torch DataLoader (golfgpt has
    none; other code in the same container may). A container gets 64 MB unless it is told otherwise."""
    if isinstance(status, str):
        return unknown("/dev/shm", ABSENT, f"{status}: several GPUs, and DataLoader workers, need it")
    size = status.f_blocks * status.f_frsize
    value = f"{size / 1e9:.2f} GB"
    if size < 1e9:
        verdict = missing if gpus > 1 else unknown  # one process does without
        return verdict("/dev/shm", value, "little for NCCL and for DataLoader workers, who die of it: --shm-size 8g")
    return Row("/dev/shm", value)


# ---- versions


# The triton that the CUDA wheel of each torch requires: by the wheels' own metadata (2.11.0, 2.12.0), and as an index
# resolves it (2.13.0: 3.7.1, constraints.txt). An installed torch says it itself, unless it is a CPU wheel.
TORCH_TRITON = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7"}
PACKAGES = {  # and what is lost without them
    "brotli": "artifacts of most runs can be neither written nor read",
    "zstandard": "text cannot be prepared and runs cannot be scored",
    "huggingface_hub": "published data cannot be downloaded",
    "tyro": "no command can be given",
}
OPTIONAL = ("huggingface_hub",)


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def required_triton() -> str | None:
    """What the installed torch's metadata asks for."""
    lines = metadata.requires("torch") or () if installed("torch") else ()
    return next((found[1] for line in lines if (found := re.match(r"triton *== *([\w.]+)", line))), None)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def torch_row(version: str) -> Row:
    if _minor(version) not in TORCH_TRITON:
        return unknown("torch", version, f"golfgpt declares {', '.join(TORCH_TRITON)}: install one of them")
    return Row("torch", version)


def triton_row(torch_version: str, triton: str | None, required: str | None, cuda: str | None) -> Row:
    """Whether torch.compile has the compiler that it was released with. A torch without CUDA compiles without it."""
    required = required or TORCH_TRITON.get(_minor(torch_version))
    wrong = broken if cuda else unknown
    exact = "" if required is None else f"=={required}{'' if required.count('.') > 1 else '.*'}"
    pin = f"pip install 'triton{exact}'"
    if triton is None:
        return wrong("triton", "not installed", f"torch.compile and the kernels need it on a GPU: {pin}")
    if required is None:
        return unknown("triton", triton, f"what torch {torch_version} needs is not known here; nothing to do")
    if _minor(triton) != _minor(required):
        return wrong("triton", triton, f"torch {torch_version} came with {required} and may not compile: {pin}")
    return Row("triton", f"{triton}, as torch {_minor(torch_version)} was released with")


def package_row(name: str, version: str | None) -> Row:
    if version is None:
        verdict = missing if name in OPTIONAL else broken
        return verdict(name, "not installed", f"without it {PACKAGES[name]}: pip install {name}")
    return Row(name, version)


def version_rows() -> Iterator[Row]:
    yield Row("golfgpt", golfgpt.__version__)
    yield Row("python", platform.python_version())
    yield torch_row(torch.__version__)
    yield triton_row(torch.__version__, installed("triton"), required_triton(), torch.version.cuda)
    yield Row("CUDA", torch.version.cuda or "none in this torch")
    if torch.version.cuda:
        cudnn = torch.backends.cudnn.version()
        absent = slow("cuDNN", "not found", "its attention cannot be chosen: install the nvidia-cudnn of this torch")
        yield Row("cuDNN", str(cudnn)) if cudnn else absent
        yield Row("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    yield from (package_row(name, installed(name)) for name in PACKAGES)


# ---- what torch and the kernels choose


def probe_attention(device: torch.device, dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """Backends that pass golfgpt.attention's probe at the baseline's shapes, and those that do not."""
    config = recipes.get("baseline").config
    passed, refused = [], []
    with sdpa_kernel(list(attention.BACKENDS.values())):  # which puts back what the process had enabled
        for name in attention.BACKENDS:
            try:
                attention.select_backend(name, config.model, [config.data.seq_len], device, dtype)
                passed.append(name)
            except InputError:
                refused.append(name)
    return passed, refused


def attention_row(passed: Sequence[str], refused: Sequence[str], cuda: bool) -> Row:
    value = f"{', '.join(passed)} pass" + (f"; {', '.join(refused)} do not" if refused else "")
    if cuda and not {"cudnn", "flash"} & set(passed):
        return slow("attention", value, "no fast backend passes its check: a GPU older than sm_80, or reinstall torch")
    return Row("attention", value)


Choices = dict[str, tuple[str, str]]  # of each kernel: "triton" or "eager", and why


def kernel_choices(device: torch.device) -> Choices:
    return {case.op: implementation(case.op, device, case.dtype) for case in tuning.QUICK}


def kernel_rows(choices: Choices, cuda: bool) -> Iterator[Row]:
    """One for each answer, with the kernels that give it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for op, choice in choices.items():
        groups.setdefault(choice, []).append(op)
    for (chosen, why), ops in groups.items():
        value = f"{f'all {len(ops)}' if len(groups) == 1 else ', '.join(ops)}: {chosen} ({why})"
        if "failed its check" in why:
            yield slow("kernels", value, "wrong on this GPU and therefore not used: please report what --tune prints")
        elif cuda and "never measured" in why:
            yield unknown("kernels", value, "golfgpt doctor --tune measures them here, in 50 s")
        else:
            yield Row("kernels", value)


def tune(device: torch.device, say: Callable[[str], None]) -> Row:
    """Check and time the kernels, and keep what impl="auto" reads; `say` gets the table and where the file lies."""
    if device.type != "cuda":
        return Row("tuning", "nothing to tune: there is no GPU")
    before = kernel_choices(device)
    tuning.quick(device, command="golfgpt doctor --tune", say=say)
    return tuned_row(before, kernel_choices(device))


def tuned_row(before: Choices, after: Choices) -> Row:
    changed = [f"{op} {before[op][0]} -> {new}" for op, (new, _) in after.items() if new != before[op][0]]
    return Row("tuning", f"changed: {', '.join(changed)}" if changed else "nothing changed")


# ---- all of it


def diagnose(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    *,
    processes: int | None = None,
    retune: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Every check; one that cannot be made is a row that says so.

    `processes`: how many join the all-reduce, on GPUs where there are as many; None: one a GPU, none without several.
    `retune` takes 50 s. `say` gets what it prints, `progress` the name of each part as it begins.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("doctor is one process and starts the others itself: run it without torchrun")
    if processes is not None and not 1 <= processes <= 64:
        raise InputError(f"--processes must lie in 1..64, got {processes}")
    rows: list[Row] = []

    def attempt(name: str, probe: Callable[[], Iterable[Any]]) -> list[Any]:
        progress(name)
        try:
            return list(probe())
        except Exception as error:
            rows.append(unknown(name, "not checked", f"the check itself failed, please report it: {first_line(error)}"))
            return []

    def check(name: str, probe: Callable[[], Iterable[Row]]) -> None:
        rows.extend(attempt(name, probe))

    progress("nvidia-smi")
    try:
        listed, silence = query_gpus(), "it lists no GPU"
    except (Failed, ValueError) as error:
        listed, silence = [], str(error)
    devices, error = usable_gpus(device)
    gpus, visible = len(devices), os.environ.get("CUDA_VISIBLE_DEVICES")
    facts = {"build": torch.version.cuda, "seen": gpus, "error": error, "listed": len(listed), "visible": visible}
    rows.append(usable_row(device, **facts))
    roofs: list[Roof] = attempt("roofs", lambda: map(measure_roof, devices))
    links: list[list[float]] = []
    if device != "cpu" and listed:
        check("GPU", lambda: loaded_rows(listed, devices, roofs))
        if len(listed) > 1:
            links = attempt("NVLink", lambda: query_nvlink(len(listed)))
    elif devices:
        rows.append(unknown("nvidia-smi", ABSENT, f"{silence}: clocks, power cap, throttling and links were not read"))
    if links:
        rows.append(nvlink_row(links))
    if roofs:
        names = {torch.cuda.get_device_name(this) for this in devices}
        check("roofs", lambda: roof_rows(names.pop() if len(names) == 1 else "several", roofs))
    if (count := processes or gpus) > 1:
        kind = "cuda" if gpus >= count else "cpu"
        rate = max(map(sum, links), default=0.0) if gpus >= count else 0.0
        check("all-reduce", lambda: [all_reduce_row(answer(all_reduce, kind, count), rate)])
    here = Path.cwd()
    check("disk", lambda: [disk_row(here, answer(probe_disk, here))])
    check("CPUs", lambda: [cpu_row(len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota(), gpus)])
    check("memory", lambda: [memory_row(parse_meminfo(_read(Path("/proc/meminfo"))))])
    check("/dev/shm", lambda: [shared_memory_row(answer(os.statvfs, "/dev/shm"), gpus)])
    check("versions", version_rows)
    best = devices[0] if devices else torch.device("cpu")
    bf16 = torch.cuda.is_bf16_supported() if devices else has_amx()
    dtype = torch.bfloat16 if bf16 else torch.float32
    check("bfloat16", lambda: [bfloat16_row(gpus, bf16, has_amx())])
    check("attention", lambda: [attention_row(*probe_attention(best, dtype), bool(devices))])
    if retune:
        check("tuning", lambda: [tune(best, say)])
    check("kernels", lambda: kernel_rows(kernel_choices(best), bool(devices)))
    check("baseline step", lambda: [measured_step(best)])
    return rows


if __name__ == "__main__":
    all_reduce_rank(sys.argv[1])
