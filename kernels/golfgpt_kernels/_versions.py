"""The oldest torch and triton that the package runs with, and what it says of older ones."""

from __future__ import annotations

import re

LEAST = {"torch": (2, 10), "triton": (3, 6)}  # triton 3.5 fails the offline gate (LOG.md)


def too_old(package: str, version: str) -> str | None:
    """Why this release of `package` cannot be used, or None."""
    least = LEAST[package]
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= least:
        return None
    needed, packages = ".".join(map(str, least)), "torch" if package == "torch" else f"torch {package}"
    return f"golfgpt_kernels needs {package} >= {needed}, found {version}: pip install --upgrade {packages}"
