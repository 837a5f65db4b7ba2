"""Plots of a report as inline SVG, drawn by matplotlib. All values are shares, 0..1, in percent."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cloc_mllm.evaluation.stats.breakdown import GroupShare
from cloc_mllm.evaluation.stats.calibration import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, TRACK, BAR, WHISKER, TICK = "#1c2330", "#eceff3", "#9cc3e6", "#1f5f99", "#c0392b"
COLORS = ("#1f5f99", "#b8480d")  # of the first and the second curve
_WIDTH_IN = 4.6  # about its width on a phone at 11 px text
_ROW_IN = 0.29


class Plot(NamedTuple):
    """A title and the drawing below it."""

    title: str
    svg: str


class Curve(NamedTuple):
    """A name for the legend, and points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def bar_plot(title: str, groups: Mapping[str, GroupShare]) -> Plot:
    """A bar per group with its interval, its value and (n); a tick where `noun_only` is known."""
    figure, axes = _figure(_ROW_IN * len(groups) + 0.1)
    for row, share in enumerate(groups.values()):
        axes.barh(row, 100, height=0.68, color=TRACK)
        axes.barh(row, 100 * share.value, height=0.68, color=BAR)
        axes.plot([100 * share.ci_low, 100 * share.ci_high], [row, row], color=WHISKER, marker="|")
        if share.noun_only is not None:
            axes.vlines(100 * share.noun_only, row - 0.42, row + 0.42, color=TICK, linewidth=2)
        axes.text(102, row, f"{100 * share.value:.1f} ({share.n})", va="center", color=INK)
    axes.set_yticks(range(len(groups)), list(groups), parse_math=False)
    axes.set(xlim=(0, 140), ylim=(len(groups) - 0.5, -0.5), xticks=[])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    return Plot(title, _svg(figure))


def curve_plot(
    title: str,
    axes_names: tuple[str, str],
    curves: Sequence[Curve],
    *,
    bins: Sequence[Bin] = (),
    diagonal: bool = False,
) -> Plot:
    """Curves over the unit square.

    Args:
        axes_names: of x and y.
        bins: points with an interval of y.
        diagonal: draws the line x = y.
    """
    figure, axes = _figure(4.0)
    if diagonal:
        axes.plot([0, 100], [0, 100], color="#8b94a1", linestyle="--", linewidth=1)
    for entry in bins:
        axes.vlines(100 * entry.confidence, 100 * entry.ci_low, 100 * entry.ci_high, color=WHISKER)
    for curve, color in zip(curves, COLORS, strict=False):
        x, y = ([100 * value for value in values] for values in zip(*curve.points, strict=True))
        axes.plot(x, y, color=color, marker="o", markersize=4, linewidth=2, label=curve.name)
    ticks = range(0, 101, 25)
    axes.set(xlim=(-2, 102), ylim=(-2, 102), xticks=ticks, yticks=ticks)
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    axes.grid(color="#e3e7ec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return Plot(title, _svg(figure))


def _figure(height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    """The drawing as an `<svg>` element with texts as texts; the same figure gives the same one."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cloc-mllm", "font.size": 9.5}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]
