"""Drawings, decoded: what they show, and that hostile names stay words."""

from __future__ import annotations

import base64
from xml.etree import ElementTree

import matplotlib
import pytest

from cloc_mllm.evaluation.report.plots import Curve, Plot, bar_plot, curve_plot
from cloc_mllm.evaluation.stats.breakdown import GroupShare
from cloc_mllm.evaluation.stats.calibration import Bin

SHARE = GroupShare(0.25, 0.2, 0.3, n=40, n_images=10, noun_only=0.5)


def texts(plot: Plot) -> list[str]:
    kind, _, content = plot.source.partition(",")
    assert kind == "data:image/svg+xml;base64"
    tree = ElementTree.fromstring(base64.b64decode(content))
    return ["".join(found.itertext()) for found in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_each_group_has_its_value_and_count() -> None:
    shown = texts(bar_plot("by kind", {"size": SHARE, "relation": SHARE}))
    assert shown == ["size", "relation", "25.0 (40)", "25.0 (40)"]


@pytest.mark.parametrize(
    "name",
    ["<script>\"&'", "$5 or $6", r"$\frac{$", "100 %_^", "Möbel"],
)
def test_names_are_words_and_no_code(name: str) -> None:
    assert texts(bar_plot("by kind", {name: SHARE}))[0] == name


def test_long_names_leave_room_for_the_bars() -> None:
    shown = texts(bar_plot("by kind", {"word\n" * 30: SHARE}))
    assert shown[0] == "word word word wo…"


def test_curves_have_axes_and_a_legend_if_there_are_two() -> None:
    points = [(0.0, 1.0), (1.0, 0.5)]
    bins = [Bin(0.4, 0.3, 0.5, n=9, n_images=9, low=0.4, high=0.5, confidence=0.45)]
    shown = texts(curve_plot("c", ("IoU, %", "accuracy, %"), [Curve("A", points)], bins=bins))
    assert {"IoU, %", "accuracy, %", "25", "100"} <= set(shown) and "A" not in shown
    both = [Curve("A", points), Curve("B", points)]
    assert {"A", "B"} <= set(texts(curve_plot("c", ("x", "y"), both, diagonal=True)))


def test_the_same_drawing_is_the_same_file_whatever_the_user_has_set() -> None:
    expected = bar_plot("by kind", {"size": SHARE})
    assert bar_plot("by kind", {"size": SHARE}) == expected
    with matplotlib.rc_context({"font.size": 30, "text.color": "red", "axes.facecolor": "black"}):
        assert bar_plot("by kind", {"size": SHARE}) == expected
