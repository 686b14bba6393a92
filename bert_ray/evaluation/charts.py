"""Drawings as inline SVG, made by matplotlib, coloured by the page: training curves, lines over shares, scatters.

The page has a light and a dark form, so colours must come from its style sheet: matplotlib draws with stand-in colours
that are then replaced by CSS variables. Text stays text (svg.fonttype none), in the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bert_ray.model.tasks.sections import Curve, Scatter

# Stand-in colour in matplotlib's drawing -> variable of the page's style sheet.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--rule)",
    "#0a0001": "var(--line-1)",
    "#0a0002": "var(--line-2)",
    "#0a0003": "var(--line-3)",
}
_LINES = [colour for colour in _COLOURS if colour.startswith("#0a")]
_INK, _FAINT, _RULE = "#010101", "#020202", "#030303"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bert_ray",  # The same drawing gives the same bytes.
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": _RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "ytick.left": False,
    "xtick.major.size": 4,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}


def curves(
    name: str,
    history: Sequence[Mapping[str, Any]],
    lines: Mapping[str, str],
    floor: float | None = None,
    over: str = "epoch",
) -> str:
    """Draw figures of a training run over its epochs, or over its steps.

    Args:
        name: unique on the page; keeps the drawing's ids apart from another's.
        history: an entry per epoch; the first entry without an `epoch` counts as epoch 1.
        lines: key in the history -> what the line is called. Keys that no entry has are left out.
        floor: a value to draw as a dashed line, the baseline to beat.
        over: the key in the history that runs from left to right.

    Returns:
        An `<svg>` element; empty where there is nothing to draw.
    """
    series = {}
    for key, label in lines.items():
        points = [
            (float(entry.get(over, number)), float(entry[key]))
            for number, entry in enumerate(history, start=1)
            if isinstance(entry.get(key), int | float)
        ]
        if points:
            series[label] = points
    if not series:
        return ""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for points, colour in zip(series.values(), _LINES, strict=False):
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, color=colour, **({"marker": "o", "markersize": 5} if over == "epoch" else {}))
        if floor is not None:
            axes.axhline(floor, color=_FAINT, linewidth=1.4, linestyle=(0, (4, 4)))
            at = (min(point[0] for points in series.values() for point in points), floor)
            axes.annotate("majority baseline", at, xytext=(0, 6), textcoords="offset points", color=_FAINT)
        axes.set_xlabel(over, color=_FAINT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(x=0.04, y=0.18)
        _name_lines(axes, [(name, points[-1]) for name, points in series.items()])

    return _drawing(name, draw)


def shares(curve: Curve) -> str:
    """Draw a Curve, both axes from 0 to 1."""

    def draw(axes: Any) -> None:
        for line, colour in zip(curve.lines, _LINES, strict=False):
            axes.plot(line.x, line.y, color=colour)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.02, 1.03)
        axes.set_xlabel(curve.x, color=_FAINT)
        axes.set_ylabel(curve.y, color=_FAINT)
        _name_lines(axes, [(line.name, (float(line.x[-1]), float(line.y[-1]))) for line in curve.lines])

    return _drawing(curve.key, draw)


def scatter(points: Scatter) -> str:
    """Draw a Scatter."""

    def draw(axes: Any) -> None:
        if points.same_units and len(points.so):
            both = (min(points.so.min(), points.said.min()), max(points.so.max(), points.said.max()))
            axes.plot(both, both, color=_FAINT, linewidth=1.4, linestyle=(0, (4, 4)))
        axes.plot(points.so, points.said, linestyle="none", marker="o", markersize=4.5, alpha=0.45, color=_LINES[0])
        axes.set_xlabel("what is so", color=_FAINT)
        axes.set_ylabel("said", color=_FAINT)
        axes.margins(0.04)

    return _drawing(points.key, draw)


def _drawing(name: str, draw: Callable[[Any], None]) -> str:
    """What `draw` puts on axes, as an `<svg>` element with ids of its own."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE), warnings.catch_warnings():
        # Text stays text, in the page's font: what matplotlib's own font lacks is no matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # A Figure without pyplot: no display, no global state.
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(name, buffer.getvalue())


def _name_lines(axes: Any, lines: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Each line's name at its end, so that no legend has to be matched by colour; moved apart where lines meet."""
    low, high = axes.get_ylim()
    gap = (high - low) / 12  # The height of a name.
    ends = sorted((y, x, label, colour) for (label, (x, y)), colour in zip(lines, _LINES, strict=False))
    above = -float("inf")
    for y, x, label, colour in ends:
        above = max(y, above + gap)
        place = (x, above)
        # A label is a user's text: a dollar sign in it begins no formula.
        axes.annotate(
            label, place, xytext=(9, 0), textcoords="offset points", va="center", color=colour, parse_math=False
        )


def _inline(name: str, drawing: str) -> str:
    """The bare `<svg>` element: no XML header, no metadata, ids of its own, the page's colours and font."""
    svg = drawing[drawing.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, variable in _COLOURS.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'\b(id=")', rf"\1{name}-", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1{name}-", svg)
    # The size comes from the page; the view box keeps the proportions.
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
