"""golfgpt: train the best language model that fits a byte budget, and prove the score."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str):
    if name == "load":  # torch is imported only when it is needed
        from golfgpt.run import load

        return load
    raise AttributeError(f"module 'golfgpt' has no attribute {name!r}")
