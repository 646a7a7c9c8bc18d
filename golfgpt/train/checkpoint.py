"""Checkpoints: one safetensors file each, atomic, digest inside, newest valid one wins, no pickle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from golfgpt.files import write_bytes

KEEP = 2
"""Checkpoints kept: the newest, and the one before in case the newest turns out damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """Training state after `step` completed steps."""

    step: int
    finished: bool
    """Whether training is over and only export and scoring remain."""
    seconds: dict[str, float]
    """The phase ledger."""
    config: dict[str, Any]
    """The run's resolved config; resuming under another one is refused."""
    dataset: str
    """Digest of the data set."""
    model: dict[str, Tensor]
    optimizers: dict[str, Tensor]
    average: dict[str, Tensor]
    """Sums of averaged weights; empty without averaging."""
    clock: float = 0.0
    """Training seconds at the start of the last step, by which the next one decides about fake quantization."""


def _digest(tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint atomically as step_NNNNNNNN.safetensors and remove all but the newest `KEEP`.

    Raises OSError (a full disk, say) with earlier checkpoints intact.
    """
    tensors = {f"model.{k}": v for k, v in checkpoint.model.items()}
    tensors |= {f"optimizers.{k}": v for k, v in checkpoint.optimizers.items()}
    tensors |= {f"average.{k}": v for k, v in checkpoint.average.items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = {
        "step": checkpoint.step,
        "finished": checkpoint.finished,
        "seconds": checkpoint.seconds,
        "config": checkpoint.config,
        "dataset": checkpoint.dataset,
        "clock": checkpoint.clock,
    }
    meta["sha256"] = _digest(tensors, meta)
    path = folder / f"step_{checkpoint.step:08d}.safetensors"
    write_bytes(path, safetensors.torch.save(tensors, {"golfgpt": json.dumps(meta)}))
    for old in sorted(folder.glob("step_*.safetensors"))[:-KEEP]:
        if old != path:  # damaged newer files sort after it
            old.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises ValueError when it is truncated, altered or not a checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["golfgpt"])
        tensors = safetensors.torch.load_file(path)
        sha256 = meta.pop("sha256")
    except (SafetensorError, KeyError, AttributeError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}") from error
    if _digest(tensors, meta) != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 does not match its content")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return Checkpoint(**meta, model=part("model."), optimizers=part("optimizers."), average=part("average."))


def latest(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and the newer files that were passed over with the reasons."""
    refused = {}
    for path in sorted(folder.glob("step_*.safetensors"), reverse=True):
        try:
            return load(path), refused
        except ValueError as error:
            refused[path] = str(error)
    return None, refused
