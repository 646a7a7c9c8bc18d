"""Curves and distributions as SVG inside the page, in the colours of the page.

Colours are drawn as placeholder values that nothing else uses, and replaced by CSS variables: --c0 to --c7 for the
runs, --rule for grids, currentColor for text. So a figure follows the page from light to dark. Text stays text, in the
page's font. Names of runs are not drawn: the page has the key.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS = 8
"""Of runs; more runs begin again."""
POINTS = 400
"""Most points of a curve, about one per pixel."""
_INK, _RULE, _RUN = "#fe01ff", "#fe01fe", "#fe01{:02x}"


@dataclass(frozen=True)
class Series:
    """One run in a figure."""

    colour: int
    x: Sequence[float]
    y: Sequence[float]
    points: Sequence[tuple[float, float]] = ()
    """Validations, drawn as circles."""
    end: tuple[float, float] | None = None
    """The score of model.golf, drawn as a diamond."""


def curves(series: Sequence[Series], name: str, x: str, y: str, *, spikes: bool = False) -> str:
    """Lines over steps or seconds. Of many values an even selection is drawn, or with `spikes` the largest of each
    stretch. The y axis leaves out what is above a run's value after a twentieth of its steps, but not the score."""

    def draw(axes: Any) -> None:
        low, high = [], []
        for s in series:
            style, values = {"color": _RUN.format(s.colour)}, np.asarray(s.y)
            shown = _largest(values) if spikes else np.unique(np.linspace(0, len(values) - 1, POINTS).astype(int))
            axes.plot(np.asarray(s.x)[shown], values[shown], linewidth=1.3, **style)
            if s.points:
                axes.plot(*zip(*s.points, strict=True), "o", markersize=4, **style)
            if s.end:
                axes.plot(*s.end, "D", markersize=6, **style)
            end = [s.end[1]] if s.end else []
            low += [values.min(), *(y for _, y in s.points), *end]
            high += [values[len(values) // 20], *end]
        room = 0.05 * (max(high) - min(low))
        if room > 0 and not spikes:
            axes.set_ylim(min(low) - room, max(high) + room)

    return _figure(draw, name, x, y)


def distribution(series: Sequence[Series], name: str, x: str) -> str:
    """Histograms of y, as outlines; the last of 40 bins also has what is above the 99th percentile."""

    def draw(axes: Any) -> None:
        values = [np.asarray(s.y) for s in series]
        everything = np.concatenate(values)
        low, high = everything.min(), np.percentile(everything, 99)
        bins = np.linspace(low, max(high, low * 1.001), 41)
        for s, own in zip(series, values, strict=True):
            counts, _ = np.histogram(np.minimum(own, bins[-1]), bins)
            axes.stairs(counts / len(own), bins, color=_RUN.format(s.colour), linewidth=1.3)

    return _figure(draw, name, x, "share of the steps")


def _largest(values: np.ndarray) -> np.ndarray:
    """Where the largest value of each of POINTS stretches is."""
    stretches = np.array_split(np.arange(len(values)), min(POINTS, len(values)))
    return np.array([part[np.argmax(values[part])] for part in stretches])


def _figure(draw: Callable[[Any], None], name: str, x: str, y: str) -> str:
    """`name` is what a screen reader says and makes ids unique in the page."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with _style():
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y)
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), name)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "golfgpt", "font.family": "DejaVu Sans", "axes.grid": True}
    with matplotlib.rc_context({**ink, **settings, "grid.color": _RULE, "grid.linewidth": 0.8}):
        yield


def _inline(svg: str, name: str) -> str:
    """The svg element, with colours, fonts and ids of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # that style is for all of a document
    svg = svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
    for colour in range(COLOURS):
        svg = svg.replace(_RUN.format(colour), f"var(--c{colour})")
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg.replace("xlink:href", "href"))
    return re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{name}">', svg, count=1)
