"""golfgpt: train the best language model that fits a byte budget, and prove the score."""

from __future__ import annotations

from golfgpt.errors import missing_package

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str):
    if name == "load":  # torch is imported only when it is needed
        try:
            from golfgpt.train.run_folder import load
        except ImportError as error:
            raise ImportError(missing_package(error) or str(error)) from error
        return load
    raise AttributeError(f"module 'golfgpt' has no attribute {name!r}")
