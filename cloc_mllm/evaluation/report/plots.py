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
_WIDTH_IN = 4.6  # about its width on a phone at 11 px text
_ROW_IN = 0.3
_LABEL_CHARACTERS = 18  # that fit beside the bars
_STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "cloc-mllm",  # the same figure gives the same file
    "text.parse_math": False,  # a $ in a name is a $
}


class Plot(NamedTuple):
    """A title, and the drawing as the `src` of an image."""

    title: str
    source: str


class Curve(NamedTuple):
    """A curve: its name in the legend, its points (x, y) and its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str = WHISKER


def bar_plot(title: str, groups: Mapping[str, GroupShare]) -> Plot:
    """Draws a bar per group with interval, value and (n), and a tick at `noun_only` if known."""
    with _drawing(_ROW_IN * len(groups), left=0.33, right=1, bottom=0, top=1) as (axes, out):
        for row, share in enumerate(groups.values()):
            axes.barh(row, 100, height=0.68, color=TRACK)
            axes.barh(row, 100 * share.value, height=0.68, color=BAR)
            ends = [100 * share.ci_low, 100 * share.ci_high]
            axes.plot(ends, [row, row], color=WHISKER, marker="|")
            if share.noun_only is not None:
                axes.vlines(100 * share.noun_only, row - 0.42, row + 0.42, color=TICK, linewidth=2)
            axes.text(102, row, f"{100 * share.value:.1f} ({share.n})", va="center")
        axes.set_yticks(range(len(groups)), [_short(name) for name in groups])
        axes.set(xlim=(0, 158), ylim=(len(groups) - 0.5, -0.5), xticks=[])
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
    with _drawing(4.0, left=0.13, right=0.98, bottom=0.12, top=0.98) as (axes, out):
        if diagonal:
            axes.plot([0, 100], [0, 100], color="#8b94a1", linestyle="--", linewidth=1)
        for entry in bins:
            ends = 100 * entry.ci_low, 100 * entry.ci_high
            axes.vlines(100 * entry.confidence, *ends, color=WHISKER)
        for curve in curves:
            x, y = ([100 * value for value in values] for values in zip(*curve.points, strict=True))
            axes.plot(
                x, y, color=curve.color, marker="o", markersize=4, linewidth=2, label=curve.name
            )
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
def _drawing(height_in: float, **edges: float) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Axes to draw into, and the buffer that then holds the SVG; user settings are ignored.

    Args:
        edges: left, right, bottom and top of the axes, 0..1 of the figure.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH_IN, height_in))
        figure.subplots_adjust(**edges)
        out = io.BytesIO()
        yield figure.subplots(), out
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})


def _source(svg: io.BytesIO) -> str:
    """Makes a `data:` address; as an image, the drawing can neither run nor load anything."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


def _short(name: str) -> str:
    """Shortens a name to one line that leaves room for the bars."""
    name = " ".join(name.split())
    return name if len(name) <= _LABEL_CHARACTERS else f"{name[: _LABEL_CHARACTERS - 1]}…"
