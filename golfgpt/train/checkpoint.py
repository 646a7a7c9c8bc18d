"""Checkpoints: one safetensors file each, without pickle, written atomically, with a digest. The newest valid one is
used."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from golfgpt.errors import InputError
from golfgpt.files import from_json, parse_json, write_bytes

KEEP = 2
"""Number of checkpoints to keep: the newest, and the one before in case the newest is damaged."""
MAX_HEADER_BYTES = 4 * 2**20
"""Largest safetensors header that is parsed: some 100 bytes per tensor."""


@dataclass(frozen=True)
class _Meta:
    """What a checkpoint holds beside tensors."""

    step: int
    finished: bool
    """Whether training is over and only export and scoring remain."""
    seconds: dict[str, float]
    """Seconds per phase."""
    config: dict[str, Any]
    """Resolved config of the run. Resuming with another one is an error, except for the fields in saver.RESUMABLE."""
    dataset: str
    """Digest of the data set."""
    clock: float = field(default=0.0, kw_only=True)
    """Training seconds at the start of the last step. The next step needs it to decide about fake quantization."""


@dataclass(frozen=True)
class Checkpoint(_Meta):
    """Training state after `step` completed steps."""

    model: dict[str, Tensor]
    optimizers: dict[str, Tensor]
    average: dict[str, Tensor]
    """State of the weight average; empty without averaging."""


def _digest(tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint atomically as step_NNNNNNNN.safetensors and remove all but the newest `KEEP`.

    Raises OSError, for example for a full disk; earlier checkpoints then stay intact.
    """
    tensors = {f"model.{k}": v for k, v in checkpoint.model.items()}
    tensors |= {f"optimizers.{k}": v for k, v in checkpoint.optimizers.items()}
    tensors |= {f"average.{k}": v for k, v in checkpoint.average.items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = {item.name: getattr(checkpoint, item.name) for item in fields(_Meta)}
    meta["sha256"] = _digest(tensors, meta)
    path = folder / f"step_{checkpoint.step:08d}.safetensors"
    write_bytes(path, safetensors.torch.save(tensors, {"golfgpt": json.dumps(meta)}))
    for old in sorted(folder.glob("step_*.safetensors"))[:-KEEP]:
        if old != path:  # damaged files of later steps sort after it
            with contextlib.suppress(OSError):  # the new one is written all the same
                old.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises InputError if it is truncated, altered or not a checkpoint."""
    try:
        with open(path, "rb") as file:
            if (header := int.from_bytes(file.read(8), "little")) > MAX_HEADER_BYTES:
                raise ValueError(f"it claims a header of {header} bytes, more than {MAX_HEADER_BYTES}")
        with safe_open(path, "pt") as file:
            stored = parse_json((file.metadata() or {})["golfgpt"], dict)
        tensors = safetensors.torch.load_file(path)
        sha256 = stored.pop("sha256")
        meta = from_json(_Meta, stored)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} is truncated or not a checkpoint: {error}; use an earlier one") from error
    if _digest(tensors, stored) != sha256:
        raise InputError(f"{path} is damaged: its SHA-256 does not match its content; use an earlier one")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return Checkpoint(**vars(meta), model=part("model."), optimizers=part("optimizers."), average=part("average."))


def latest(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest intact checkpoint, and the damaged newer files with the reasons."""
    refused = {}
    for path in sorted(folder.glob("step_*.safetensors"), reverse=True):
        try:
            return load(path), refused
        except InputError as error:
            refused[path] = str(error)
    return None, refused
