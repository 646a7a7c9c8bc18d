"""What this machine keeps from run to run: files under $XDG_CACHE_HOME/golfgpt, named by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def kept_file(folder: str, device: torch.device, facts: dict[str, Any], suffix: str) -> Path:
    """Where the answer for `facts` on this GPU, under the versions installed, is kept."""
    packages = ("torch", "triton", "golfgpt", "flash_attn_3")
    everything = facts | {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": [torch.version.cuda, torch.backends.cudnn.version(), *map(_version, packages)],
    }
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "golfgpt" / folder / (digest + suffix)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
