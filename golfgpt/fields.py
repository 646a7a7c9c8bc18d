"""Base class of the sections of the configuration. The type of a field contains its limits:

    prune: Annotated[float, Limit(">=", 0), Limit("<", 1)] = 0.0

Standard library only.
"""

from __future__ import annotations

import functools
import math
import operator
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Limit:
    """A bound that the value of a field must satisfy. The value must also be finite."""

    relation: Literal[">=", ">", "<=", "<"]
    bound: float

    def __str__(self) -> str:
        return f"{self.relation} {self.bound}"


Count = Annotated[int, Limit(">=", 1)]
CountOrZero = Annotated[int, Limit(">=", 0)]
Positive = Annotated[float, Limit(">", 0)]
NotNegative = Annotated[float, Limit(">=", 0)]
Fraction = Annotated[NotNegative, Limit("<=", 1)]
FractionAboveZero = Annotated[Positive, Limit("<=", 1)]
FractionBelowOne = Annotated[NotNegative, Limit("<", 1)]


class Section:
    """Base class of the config dataclasses. Raises ValueError for a value outside the limits of its field. If fields
    depend on each other, the section checks that in its own `__post_init__`."""

    SECTION = ""
    """Its name in RunConfig and on the command line, if that is not the name of the class before "Config"."""

    def __post_init__(self) -> None:
        section = self.SECTION or type(self).__name__.removesuffix("Config").lower()
        for name, limits in _limits(type(self)).items():
            value = getattr(self, name)
            if value is not None and not _within(value, limits):
                raise ValueError(f"{section}.{name} is {value}; expected {' and '.join(map(str, limits))}")


def _within(value: float, limits: tuple[Limit, ...]) -> bool:
    return math.isfinite(value) and all(_COMPARE[limit.relation](value, limit.bound) for limit in limits)


@functools.cache
def _limits(section: type) -> dict[str, tuple[Limit, ...]]:
    """Limits by field name. A field of type `X | None` has the limits of X."""
    hints = typing.get_type_hints(section, include_extras=True)
    found = {name: tuple(_find(hint)) for name, hint in hints.items()}
    return {name: limits for name, limits in found.items() if limits}


def _find(hint: Any) -> Iterator[Limit]:
    if isinstance(hint, Limit):
        yield hint
    for part in typing.get_args(hint):
        yield from _find(part)
