"""A guard against a fault of MKL: other bits, or a refused score, in a few of a hundred processes on a CPU."""

from __future__ import annotations

import torch

FUNCTIONS = [
    "acos",
    "asin",
    "atan",
    "cos",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log1p",
    "log2",
    "sin",
    "sqrt",
    "tan",
    "tanh",
]
"""Functions that torch takes from MKL's vector math on a CPU."""


def resolve() -> None:
    """Make the first call of each function of vector math in this process, on one element and therefore in one thread.

    MKL 2024.2, which torch 2.13 is built with, looks for its kernel in a function's first call. If several threads make
    that call together, one of them may use a kernel of half the digits for its part (pytorch issue 188792): the cosines
    of rotary embedding were off by 1.5e-4 in some 3 of 100 processes (LOG.md). Later calls are right.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(one)
