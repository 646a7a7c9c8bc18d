"""Which implementation of the ops a process takes."""

from __future__ import annotations

import torch
from golfgpt_kernels import cannot_run, set_implementation

from golfgpt.config import RunConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError


def choose_kernels(config: RunConfig, ranks: Ranks) -> set_implementation:
    """runtime.kernels for the process, until the block ends. Raises InputError if kernels cannot run here."""
    choice = config.runtime.kernels
    if choice == "triton" and (reason := cannot_run(ranks.device, torch.float32)):
        raise InputError(f"runtime.kernels is triton, which cannot run: {reason}; use --runtime.kernels auto")
    return set_implementation(choice)
