"""The oldest torch and triton that the package runs with, and what it says of older ones."""

from __future__ import annotations

import re

LEAST = {"torch": (2, 10), "triton": (3, 6)}  # triton 3.5 fails the offline gate (LOG.md)
GLUON = ((3, 6), (3, 9))  # first and last triton that impl="gluon" passes it with; Gluon changes with each release


def too_old(package: str, version: str) -> str | None:
    """Why this release of `package` cannot be used, or None."""
    least = LEAST[package]
    if release(version) >= least:
        return None
    needed, packages = ".".join(map(str, least)), "torch" if package == "torch" else f"torch {package}"
    return f"golfgpt_kernels needs {package} >= {needed}, found {version}: pip install --upgrade {packages}"


def gluon_untried(version: str) -> str | None:
    """Why impl="gluon" does not run with this release of triton, or None."""
    first, last = GLUON
    if first <= release(version) <= last:
        return None
    tried = " to ".join(".".join(map(str, each)) for each in GLUON)
    return f"it was compiled with triton {tried} only, found {version}"


def release(version: str) -> tuple[int, ...]:
    """(3, 7) of 3.7.1"""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
