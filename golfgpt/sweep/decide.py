"""Keep or discard: a group-sequential test of paired differences, with its looks fixed in advance.

At look k the first n_k seeds are in. t_k is the mean of their differences (incumbent minus change, so that positive is
better) over its standard error. The change is kept at the first look at which t_k reaches the bound c_k, and
discarded at a look at which the mean is not positive, or at the last one.

The bounds spend alpha as alpha log(1 + (e - 1) n_k / n_K), Lan and DeMets' form of Pocock's bound (Biometrika 70,
1983). They are quantiles of simulated null statistics, because the normal theory's bounds are far too low for three to
eight seeds. Discarding early is not counted in them, so that it can only lower the rate of false keeps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line starts without numpy
    import numpy as np

ALPHA = 0.03
"""Share of changes without effect that are kept if noise is normal. The promise is 5 %; the rest is room for other
noise."""
LOOKS = (3, 5, 8)
"""Seeds at each look."""
DRAWS = 400_000
"""Simulated experiments without an effect: the bounds' level is off by 0.0003, one standard error."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the differences of the seeds so far say."""

    verdict: Literal["keep", "discard", "continue"]
    seeds: int
    mean: float
    """Mean difference; positive: the change is better."""
    low: float
    high: float
    """Repeated confidence interval, mean -+ c_k standard errors; `low` is above 0 if and only if the change is kept."""
    confidence: float
    """1 - p that the change is better, where p counts the earlier looks too; at least 1 - ALPHA in a keep."""


def decide(differences: Sequence[float], looks: Sequence[int] = LOOKS, alpha: float = ALPHA) -> Decision:
    """The decision at the look that has as many seeds as there are differences. Raises ValueError if none has."""
    import numpy as np

    looks, n = tuple(looks), len(differences)
    if n not in looks:
        raise ValueError(f"{n} differences; expected the seeds of a look, {', '.join(map(str, looks))}")
    look = under_null(looks, alpha)[looks.index(n)]
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(n)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    verdict = "keep" if t >= look.bound else "discard" if mean <= 0 or n == looks[-1] else "continue"
    p = look.spent + (look.t.size - int(np.searchsorted(look.t, t))) / DRAWS
    low, high = mean - look.bound * error, mean + look.bound * error
    return Decision(verdict=verdict, seeds=n, mean=mean, low=low, high=high, confidence=1 - p)


@dataclass(frozen=True)
class Look:
    """A look at DRAWS experiments whose differences are normal with mean 0. The size of the noise cancels in t."""

    bound: float
    spent: float
    """Share of the experiments that were kept at earlier looks."""
    t: np.ndarray
    """t of the others, ascending."""


@functools.cache
def under_null(looks: tuple[int, ...], alpha: float = ALPHA) -> tuple[Look, ...]:
    """All looks, simulated from a fixed seed. The bound of each lets its share of alpha through. Raises ValueError for
    looks that do not increase or that begin with one seed, which has no spread."""
    import numpy as np

    if looks[0] < 2 or list(looks) != sorted(set(looks)):
        raise ValueError(f"looks are {looks}; expected increasing numbers of seeds, from 2 on")
    x = np.random.default_rng(0).standard_normal((DRAWS, looks[-1]))
    out = []
    for n in looks:
        t = x[:, :n].mean(1) / x[:, :n].std(1, ddof=1) * math.sqrt(n)
        spent, order = 1 - len(x) / DRAWS, np.sort(t)
        share = alpha * math.log(1 + (math.e - 1) * n / looks[-1]) - spent
        out.append(Look(float(order[-round(share * DRAWS)]), spent, order))
        x = x[t < out[-1].bound]
    return tuple(out)
