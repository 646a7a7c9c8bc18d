"""What a machine keeps from run to run: files under $XDG_CACHE_HOME/golfgpt, named after all that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from golfgpt.files import read_json, write_json

Value = TypeVar("Value")


def kept_file(folder: str, device: torch.device, facts: dict[str, Any], suffix: str) -> Path:
    """The file for `facts` on this GPU or CPU under the installed versions."""
    packages = map(package_version, ("torch", "triton", "golfgpt", "flash_attn_3"))
    everything = facts | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "versions": [torch.version.cuda, torch.backends.cudnn.version(), *packages],
    }
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "golfgpt" / folder / (digest + suffix)


def kept_value(
    folder: str,
    device: torch.device,
    facts: dict[str, Any],
    read: Callable[[Any], Value],
    make: Callable[[], Any],
    keep: Callable[[Any], bool] = bool,
) -> tuple[Value, bool]:
    """read(value) of a JSON value, and whether an earlier run with the same `facts` made it. Else it is made now, and
    kept if keep(value), by default unless it is empty. A kept file that `read` does not understand (ValueError,
    KeyError, TypeError, AttributeError) is ignored."""
    file = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        file = kept_file(folder, device, facts, ".json")  # RuntimeError: there is no home directory
        return read(read_json(file, dict)["value"]), True
    value = make()
    if file and keep(value):
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, facts | {"value": value})
    return read(value), False


def kept_times(
    folder: str,
    device: torch.device,
    facts: dict[str, Any],
    names: Collection[str],
    measure: Callable[[], dict[str, float]],
) -> tuple[dict[str, float], bool]:
    """Times by name, fastest first, and whether an earlier run with the same `facts` measured them. A kept file without
    a valid time for each of `names` is ignored; so is a measurement that has none."""

    def read(times: dict[str, float]) -> dict[str, float]:
        if times and (times.keys() != set(names) or not all(0 < float(time) < math.inf for time in times.values())):
            raise ValueError(f"expected a time for each of {names}, got {times}")
        return dict(sorted(times.items(), key=lambda item: item[1]))

    return kept_value(folder, device, facts, read, measure)


def _cpu() -> list[str]:
    """Model and instruction sets: virtual machines often hide the model's generation."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    lines = set(re.findall(r"^(?:model name|flags|Features)\s*:.*", text, re.MULTILINE))
    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), *sorted(lines)]


def package_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
