"""What this machine is, how fast it runs, and what keeps a run from starting or from being fast.

`probe` asks the machine, `judge` turns what it said into rows, `diagnose` is the table of what is asked.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from golfgpt.doctor import judge, probe
from golfgpt.doctor.judge import Row
from golfgpt.errors import InputError
from golfgpt.train.reporter import table


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
    progress("nvidia-smi")
    listed, silence = probe.gpus()
    devices, error = probe.usable(device)
    build, visible = torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES")
    rows = [judge.usable(device, build=build, seen=len(devices), error=error, listed=len(listed), visible=visible)]
    if not listed and device != "cpu" and (devices or shutil.which("nvidia-smi")):
        rows.append(judge.refused("nvidia-smi", probe.Failed(silence)))
    gpus, smi, count = len(devices), bool(listed) and device != "cpu", processes or len(devices)
    best, kind = devices[0] if devices else torch.device("cpu"), "cuda" if gpus >= count else "cpu"
    names = " and ".join(sorted({torch.cuda.get_device_name(each) for each in devices}))
    facts: dict[str, Any] = {}

    def nvidia_smi() -> list[probe.Gpu]:
        return probe.under_load(devices, facts["roofs"]) if "roofs" in facts else listed

    def sum_links(fact: tuple[int, str, float]) -> Row:
        return judge.all_reduce(*fact, facts.get("NVLink", ()) if kind == "cuda" else ())

    checks: tuple[tuple[str, Any, Callable[[], Any], Callable[..., Row | list[Row]]], ...] = (
        ("roofs", gpus, lambda: [probe.roof(each) for each in devices], lambda f: judge.roofs(names, f)),
        ("GPU", smi, nvidia_smi, lambda f: judge.gpus(f, "roofs" in facts)),
        ("NVLink", smi and len(listed) > 1, lambda: probe.nvlink(len(listed)), judge.nvlink),
        ("all-reduce", count > 1, lambda: probe.all_reduce(kind, count), sum_links),
        ("disk", True, lambda: probe.disk(Path.cwd()), lambda f: judge.disk(*f)),
        ("CPUs", True, probe.cpus, lambda f: judge.cpus(*f, gpus)),
        ("memory", True, probe.memory, lambda f: judge.memory(*f)),
        ("/dev/shm", True, lambda: os.statvfs("/dev/shm"), lambda f: judge.shared_memory(f, gpus)),
        ("versions", True, probe.versions, judge.versions),
        ("attention", True, lambda: probe.attention_backend(best), lambda f: judge.attention(*f, gpus > 0)),
        ("tuning", retune, lambda: probe.tune(best, say), judge.tuned),
        ("kernels", True, lambda: probe.kernel_choices(best), lambda f: judge.kernels(f, gpus > 0)),
        ("baseline step", gpus, lambda: probe.steps(best, names), lambda f: judge.step(*f, torch.__version__)),
    )
    for name, applies, ask, judged in checks:
        if applies:
            progress(name)
            try:
                facts[name] = ask()
                found = judged(facts[name])
            except Exception as failed:
                found = judge.refused(name, failed)
            rows += [found] if isinstance(found, Row) else found
    return rows


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
