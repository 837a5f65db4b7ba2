"""Plots of a report as SVG, drawn by matplotlib. All values are shares, 0..1, in percent."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from cloc_mllm.evaluation.stats.breakdown import GroupShare
from cloc_mllm.evaluation.stats.calibration import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, TRACK, BAR, WHISKER, TICK = "#1c2330", "#eceff3", "#9cc3e6", "#1f5f99", "#c0392b"
COLORS = ("#1f5f99", "#b8480d")  # of the first and the second curve
_WIDTH_IN = 4.6  # about its width on a phone at 11 px text
_ROW_IN = 0.29
_STYLE = {
    "font.size": 9.5,
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "cloc-mllm",  # the same figure gives the same file
    "text.parse_math": False,  # a $ in a name is a $
}


class Plot(NamedTuple):
    """A title, and the drawing as the `src` of an image."""

    title: str
    source: str


class Curve(NamedTuple):
    """A name for the legend, and points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def bar_plot(title: str, groups: Mapping[str, GroupShare]) -> Plot:
    """A bar per group with its interval, its value and (n); a tick where `noun_only` is known."""
    with _drawing(_ROW_IN * len(groups) + 0.1) as (axes, out):
        for row, share in enumerate(groups.values()):
            axes.barh(row, 100, height=0.68, color=TRACK)
            axes.barh(row, 100 * share.value, height=0.68, color=BAR)
            ends = [100 * share.ci_low, 100 * share.ci_high]
            axes.plot(ends, [row, row], color=WHISKER, marker="|")
            if share.noun_only is not None:
                axes.vlines(100 * share.noun_only, row - 0.42, row + 0.42, color=TICK, linewidth=2)
            axes.text(102, row, f"{100 * share.value:.1f} ({share.n})", va="center", color=INK)
        axes.set_yticks(range(len(groups)), [_short(name) for name in groups])
        axes.set(xlim=(0, 140), ylim=(len(groups) - 0.5, -0.5), xticks=[])
        axes.tick_params(left=False)
        axes.spines[:].set_visible(False)
    return Plot(title, _source(out))


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
    with _drawing(4.0) as (axes, out):
        if diagonal:
            axes.plot([0, 100], [0, 100], color="#8b94a1", linestyle="--", linewidth=1)
        for entry in bins:
            ends = 100 * entry.ci_low, 100 * entry.ci_high
            axes.vlines(100 * entry.confidence, *ends, color=WHISKER)
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
    return Plot(title, _source(out))


@contextmanager
def _drawing(height_in: float) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Axes to draw into, and the buffer that then holds the SVG; user settings are ignored."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        out = io.BytesIO()
        yield figure.subplots(), out
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})


def _source(svg: io.BytesIO) -> str:
    """A `data:` address: as an image of its own, the drawing can neither run nor load anything."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


def _short(name: str) -> str:
    """One line that leaves room for the bars."""
    name = " ".join(name.split())
    return name if len(name) <= 24 else f"{name[:23]}…"
