"""What visitors draw: plain functions, no Gradio."""

from __future__ import annotations

from typing import Any

import pytest

from cloc_mllm.demo.strokes import MAX_POINTS, Stroke, read_stroke

SIZE = (200, 100)


def drawn(kind: str, *points: Any) -> dict[str, Any]:
    return {"kind": kind, "points": [list(point) for point in points]}


@pytest.mark.parametrize(
    "corners",
    [[(0.1, 0.2), (0.5, 0.6)], [(0.5, 0.6), (0.1, 0.2)], [(0.1, 0.6), (0.5, 0.2)]],
    ids=["down-right", "up-left", "up-right"],
)
def test_a_drag_in_any_direction_is_one_box(corners: list[tuple[float, float]]) -> None:
    stroke = read_stroke(drawn("box", corners[0], (0.9, 0.9), corners[1]), SIZE)
    assert stroke.box(SIZE) == (0.1, 0.2, 0.5, 0.6)
    assert stroke.region(SIZE) == [0.1, 0.2, 0.5, 0.6]


def test_a_tap_is_a_point_and_the_square_around_it() -> None:
    stroke = read_stroke(drawn("point", (0.5, 0.5)), SIZE)
    assert stroke.region(SIZE) == [0.5, 0.5]
    assert stroke.box(SIZE) == pytest.approx((0.45, 0.4, 0.55, 0.6))
    corner = Stroke("point", ((1.0, 0.0),)).box(SIZE)
    assert corner == pytest.approx((0.9, 0.0, 1.0, 0.2))


def test_a_scribble_is_a_mask_and_the_box_around_it() -> None:
    stroke = read_stroke(drawn("scribble", (0.25, 0.5), (0.75, 0.5)), SIZE)
    mask = stroke.region(SIZE)
    assert mask.shape == (100, 200) and mask.dtype == bool
    assert mask[50, 60:140].all() and not mask[:40].any() and not mask[:, :40].any()
    assert stroke.box(SIZE) == pytest.approx((0.24, 0.48, 0.76, 0.52))


@pytest.mark.parametrize(
    "event",
    [
        None,
        3,
        "box",
        {},
        {"kind": "circle", "points": [[0.1, 0.1]]},
        {"kind": ["box"], "points": [[0.1, 0.1]]},
        {"kind": "box"},
        {"kind": "box", "points": []},
        {"kind": "box", "points": {"0": [0, 0]}},
        drawn("point", (float("nan"), 0.5)),
        drawn("point", (0.5, float("inf"))),
        drawn("point", (-0.1, 0.5)),
        drawn("point", (10**400, 0.5)),
        drawn("point", ("0.1", 0.5)),
        drawn("point", (0.1, 0.5, 0.5)),
        drawn("scribble", *[(0.5, 0.5)] * (MAX_POINTS + 1)),
    ],
    ids=repr,
)
def test_events_may_hold_anything(event: Any) -> None:
    with pytest.raises(ValueError, match="draw again inside the picture"):
        read_stroke(event, SIZE)


def test_a_box_without_area_is_refused() -> None:
    with pytest.raises(ValueError, match="too thin"):
        read_stroke(drawn("box", (0.1, 0.1), (0.9, 0.11)), SIZE)
