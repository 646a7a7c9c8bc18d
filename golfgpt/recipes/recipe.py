"""What a recipe is. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from golfgpt.config import RunConfig


@dataclass(frozen=True)
class Recipe:
    """A named configuration with a summary and notes."""

    name: str
    summary: str
    """One sentence."""
    config: RunConfig
    notes: tuple[str, ...] = ()
    """What is published about it, which of its fields reproduce flaws, and how golfgpt differs."""
