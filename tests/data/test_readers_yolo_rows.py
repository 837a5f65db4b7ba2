"""Rows of YOLO label files: boxes, polygons, keypoints, scores, and what cannot be told apart."""

from __future__ import annotations

import math
import re

import pytest

from cloc_mllm.data.readers.yolo_rows import Task, parse_row, tell_task

BOX = "0.25 0.5 0.3 0.4"
CXCYWH = [0.25, 0.5, 0.3, 0.4]
SQUARE = "0.1 0.3 0.4 0.3 0.4 0.7 0.1 0.7"  # as a polygon
POINTS_2 = "0.15 0.40 0.25 0.50 0.35 0.60"
POINTS_3 = "0.15 0.40 2 0.25 0.50 1 0 0 0"


@pytest.mark.parametrize(
    ("line", "task", "keypoints"),
    [
        pytest.param(f"0 {BOX}", None, None, id="box"),
        pytest.param(f"0 {BOX}", "pose", (3, 2), id="box_among_poses"),
        pytest.param("0 2.5e-1 .5 0.30 4e-1", None, None, id="exponents"),
        pytest.param("0\t0.25  0.5\t0.3 0.4 ", None, None, id="tabs"),
        pytest.param("0 ０.２５ 0.5 0.3 0.4", None, None, id="full_width"),
        pytest.param(f"0 {SQUARE}", "segment", None, id="oriented_box"),
        pytest.param("0 0.1 0.3 0.4 0.3 0.4 0.7", "segment", None, id="triangle"),
        pytest.param("0 0.1 0.3 0.4 0.3 0.4 0.7 0.1 0.7 0.1 0.5", "segment", None, id="polygon"),
        pytest.param(f"0 {BOX} {POINTS_2}", "pose", (3, 2), id="keypoints"),
        pytest.param(f"0 {BOX} {POINTS_3}", "pose", (3, 3), id="keypoints_with_visibility"),
        pytest.param(f"0 {BOX} {POINTS_3}", "pose", (3, 2), id="visibility_not_in_the_yaml"),
        pytest.param(f"0 {BOX} {POINTS_2}", "pose", (3, 3), id="visibility_only_in_the_yaml"),
        pytest.param(f"0 {BOX} {POINTS_3}", "pose", None, id="keypoints_without_a_shape"),
    ],
)
def test_rows(line: str, task: Task | None, keypoints: tuple[int, int] | None) -> None:
    row = parse_row(line, task, keypoints)
    assert (row.class_key, row.score, row.fault) == ("0", 1.0, "")
    assert row.cxcywh == pytest.approx(CXCYWH)


@pytest.mark.parametrize(
    "class_text", ["7", "7.0", "7.", "7.000000000000000000e+00", "７", "+7", "07"]
)
def test_class_numbers(class_text: str) -> None:
    assert parse_row(f"{class_text} {BOX}", None, None).class_key == "7"


@pytest.mark.parametrize(
    ("line", "task", "keypoints"),
    [
        (f"0 {BOX} 0.91", None, None),
        (f"0 {SQUARE} 0.91", "segment", None),
        (f"0 {BOX} {POINTS_2} 0.91", "pose", (3, 2)),
        (f"0 {BOX} {POINTS_3} .91", "pose", (3, 3)),
    ],
)
def test_a_score_may_follow(
    line: str, task: Task | None, keypoints: tuple[int, int] | None
) -> None:
    row = parse_row(line, task, keypoints)
    assert (row.score, row.fault) == (0.91, "")
    assert row.cxcywh == pytest.approx(CXCYWH)


@pytest.mark.parametrize(
    ("line", "task", "message"),
    [
        ("0", None, "fewer than four numbers"),
        ("0 0.1 0.2 0.3", None, "fewer than four numbers"),
        (f"0 {BOX} 12", None, "a score in 0..1 as the last number, got 12"),
        (f"0 {BOX} x", None, "a score in 0..1"),
        (f"0 {BOX} {POINTS_2}", None, "10 numbers may be a polygon or a box with keypoints"),
        (f"0 {BOX} 0.1 0.2", "detect", "say which with --task"),
        (f"0 {BOX} 0.1 0.2", "pose", r"kpt_shape \[3, 2\] asks for 10 or 13 numbers .* not 6"),
    ],
)
def test_refused_rows_say_why(line: str, task: Task | None, message: str) -> None:
    row = parse_row(line, task, (3, 2) if task == "pose" else None)
    assert re.search(message, row.fault), row.fault
    assert all(map(math.isnan, row.cxcywh))


@pytest.mark.parametrize("line", ["0 0.1 nan 0.3 0.4", "0 x y z w", "0 0.1 0.3 0.4 nan 0.4 0.7"])
def test_numbers_that_are_none_stay_nan(line: str) -> None:
    row = parse_row(line, "segment", None)
    assert any(map(math.isnan, row.cxcywh)) and not row.fault


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([f"0 {BOX}"], None, id="nothing_to_tell"),
        pytest.param([f"0 {SQUARE}"], "segment", id="oriented_boxes"),
        pytest.param([f"0 {SQUARE}", f"0 {SQUARE} 0.1 0.5"], "segment", id="two_lengths"),
        pytest.param([f"0 {BOX} {POINTS_3}"], "pose", id="visibility_over_1"),
        pytest.param([f"0 {BOX} {POINTS_2}"], None, id="may_be_both"),
        pytest.param([f"0 {BOX} {POINTS_2}", f"0 {SQUARE} 0.1 0.5"], "segment", id="one_cannot"),
        pytest.param([f"0 {BOX}", f"0 {BOX} {POINTS_3}"], "pose", id="boxes_among_them"),
        pytest.param(["0 1 2 3 4 5 6 7"], None, id="neither"),
    ],
)
def test_polygons_and_keypoints_are_told_apart(rows: list[str], expected: Task | None) -> None:
    assert tell_task(rows) == expected
