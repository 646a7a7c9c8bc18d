"""Which ops run as Triton kernels: runtime.kernels."""

from __future__ import annotations

import torch
from golfgpt_kernels import cannot_run, set_implementation

from golfgpt.config import RunConfig
from golfgpt.distributed import Ranks
from golfgpt.errors import InputError
from golfgpt.train.config import KERNELS


def choose_kernels(config: RunConfig, ranks: Ranks) -> set_implementation:
    """runtime.kernels for the process, until the block ends. Raises InputError if kernels cannot run here."""
    choice = config.runtime.kernels
    if choice not in ("auto", "eager") and (reason := cannot_run(ranks.device, torch.float32)):
        raise InputError(f"runtime.kernels is {choice}, which cannot run: {reason}; use --runtime.kernels eager")
    return set_kernels(choice)


def set_kernels(choice: str) -> set_implementation:
    """The value of runtime.kernels for the process."""
    return set_implementation(*meanings(choice))


def meanings(choice: str) -> tuple[str, dict[str, str]]:
    """The implementation of all ops that a value of runtime.kernels means, and those of ops that it names."""
    if choice in ("auto", "eager", "triton"):
        return choice, {}
    return "eager", {op: impl for part in choice.split(",") for op, impl in KERNELS[part].items()}
