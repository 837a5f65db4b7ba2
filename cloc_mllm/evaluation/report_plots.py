"""Plots of the report as inline SVG: no script, no library; every text is escaped.

All values are shares, 0..1, and shown in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

_WIDTH = 340  # units of the drawing; about its width in px on a phone, so texts stay readable
_LABEL, _COUNT, _ROW = 112, 84, 22  # units: group names, their counts, height of a bar's row
_LEFT, _TOP, _SIDE = 40, 10, 240  # units: where the square of a curve lies
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Series(NamedTuple):
    """A curve: its name for the legend, its CSS class and its points (x, y)."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


def bar_plot(title: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar a group with its interval, its value and (n); a tick where there is a `noun_only`."""
    width = _WIDTH - _LABEL - _COUNT
    parts = []
    for row, (name, entry) in enumerate(groups.items()):
        y = row * _ROW
        low, high = (_LABEL + width * entry[key] for key in ("ci_low", "ci_high"))
        value = 100 * entry["value"]
        parts.append(
            f'<g><text x="{_LABEL - 6}" y="{y + 14}" class="name">{escape(name)}</text>'
            f'<rect class="track" x="{_LABEL}" y="{y + 3}" width="{width}" height="15"/>'
            f'<rect class="fill" x="{_LABEL}" y="{y + 3}" width="{width * entry["value"]:.1f}" '
            'height="15"/>'
            f'<path class="whisker" d="M{low:.1f} {y + 10.5}H{high:.1f}M{low:.1f} {y + 7}v7'
            f'M{high:.1f} {y + 7}v7"/>'
            f'<text x="{_LABEL + width + 4}" y="{y + 14}">{value:.1f}'
            f'<tspan class="count" dx="4">({entry["n"]})</tspan></text>'
            f"<title>{escape(name)}: {value:.1f} % of {entry['n']}</title></g>"
        )
        if "noun_only" in entry:
            x = _LABEL + width * entry["noun_only"]
            parts.append(f'<path class="floor" d="M{x:.1f} {y + 1}v19"/>')
    return _figure(title, "".join(parts), len(groups) * _ROW)


def curve_plot(
    title: str,
    axes: tuple[str, str],
    series: Sequence[Series],
    *,
    bins: Sequence[Mapping[str, Any]] = (),
    diagonal: bool = False,
) -> str:
    """Curves over the unit square, whose x and y axis have the names `axes`.

    Args:
        bins: points with an interval of y: `confidence`, `value`, `ci_low`, `ci_high`.
        diagonal: draw the line x = y.
    """
    bottom = _TOP + _SIDE
    parts = []
    for tick in _TICKS:
        x, y, text = _x(tick), _y(tick), f"{100 * tick:.0f}"
        parts.append(
            f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}M{_LEFT} {y:.1f}H{_LEFT + _SIDE}"/>'
            f'<text x="{x:.1f}" y="{bottom + 14}" class="middle">{text}</text>'
            f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" class="name">{text}</text>'
        )
    if diagonal:
        parts.append(f'<path class="diagonal" d="M{_x(0)} {_y(0)}L{_x(1)} {_y(1)}"/>')
    for entry in bins:
        low, high = _y(entry["ci_low"]), _y(entry["ci_high"])
        parts.append(
            f'<path class="whisker" d="M{_x(entry["confidence"]):.1f} {low:.1f}V{high:.1f}"/>'
        )
    for curve in series:
        points = [f"{_x(x):.1f},{_y(y):.1f}" for x, y in curve.points]
        dots = "".join('<circle cx="{}" cy="{}" r="2.5"/>'.format(*p.split(",")) for p in points)
        line = f'<polyline points="{" ".join(points)}"/>'
        parts.append(f'<g class="curve {curve.style}">{line}{dots}</g>')
    centre = _LEFT + _SIDE / 2
    parts.append(f'<text x="{centre}" y="{bottom + 30}" class="middle">{escape(axes[0])}</text>')
    middle = f"12 {_TOP + _SIDE / 2}"
    parts.append(
        f'<text transform="translate({middle}) rotate(-90)" class="middle">{escape(axes[1])}</text>'
    )
    return _figure(title, "".join(parts), bottom + 36, _legend(series))


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    names = "".join(
        f'<span class="line {curve.style}"></span>{escape(curve.name)} ' for curve in series
    )
    return f'<p class="legend">{names}</p>'


def _x(value: float) -> float:
    return _LEFT + _SIDE * value


def _y(value: float) -> float:
    return _TOP + _SIDE * (1 - value)


def _figure(title: str, drawing: str, height: float, below: str = "") -> str:
    return (
        f'<div class="plot"><h3>{escape(title)}</h3><svg viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{escape(title, quote=True)}">{drawing}</svg>{below}</div>'
    )
