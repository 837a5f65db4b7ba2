"""Boxes of every notation and frame, found again where they were painted."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.data.images import Header, read_header
from cloc_mllm.data.readers.boxes import (
    OTHER_SHAPE,
    RESIZED,
    TURNED,
    UNTOLD,
    BoxFrame,
    around_ellipse,
    around_turned,
    box_frame,
    boxes_from_xywh,
    boxes_from_xyxy,
    enclosing_corners,
    share_frame,
    xywh_of_annotation,
)
from tests.photos import encoded, turned

EXPECTED = pytest.approx((0.1, 0.2, 0.3, 0.6))
NO_BOX = [None, 7, "ab", [1, 2, 3], [1, 2, 3, 4, 5], [None] * 4, [1, 2, 3, {}], [True] * 4]


def test_notations() -> None:
    frame = BoxFrame(100, 50)
    assert frame.from_xyxy([[10, 10, 30, 30]])[0] == EXPECTED
    assert frame.from_xywh([[10, 10, 20, 20]])[0] == EXPECTED
    assert frame.from_cxcywh([[20, 20, 20, 20]])[0] == EXPECTED
    assert frame.from_padded([[0.1, 0.35, 0.3, 0.55]])[0] == EXPECTED
    assert frame.from_xyxy([["10", "1e1", "３０", " 30 "]])[0] == EXPECTED
    assert boxes_from_xyxy([[10, 10, 30, 30]], 100, 50)[0] == EXPECTED
    assert boxes_from_xywh([[10, 10, 20, 20]], "100", 50.0)[0] == EXPECTED


@pytest.mark.parametrize("row", NO_BOX)
def test_row_that_is_no_box_becomes_nan(row: object) -> None:
    good, bad = boxes_from_xyxy([[10, 10, 30, 30], row], 100, 50)
    assert good == EXPECTED
    assert any(value != value for value in bad)


@pytest.mark.parametrize("width", [0, -5, None, "wide", float("nan")])
def test_without_a_size_and_a_file_there_is_no_box(width: object) -> None:
    (box,) = boxes_from_xyxy([[10, 10, 30, 30]], width, 50)
    assert all(value != value for value in box)


def test_negative_zero_never_leaves() -> None:
    frame = BoxFrame(100, 50)
    rows = [[-0.0, -0.0, 30, 30]]
    boxes = frame.from_xyxy(rows) + frame.from_xywh(rows)
    boxes += BoxFrame(100, 50, Image.Transpose.ROTATE_90).from_xyxy([[0, 0, 100, 50]])
    assert not any(math.copysign(1, value) < 0 for box in boxes for value in box)


# frames


UPRIGHT = (90, 60)
PLACE = (9, 6, 36, 48)  # of the upright picture


def painted(orientation: int | None) -> bytes:
    image = Image.new("RGB", UPRIGHT, "white")
    image.paste("red", PLACE)
    return encoded(image, orientation=orientation)


def place_before_turn(orientation: int) -> tuple[int, int, int, int]:
    """Where the square is in the stored picture; found by painting, not by arithmetic."""
    mask = Image.new("L", UPRIGHT)
    mask.paste(255, PLACE)
    found = turned(mask, orientation).getbbox()
    assert found is not None
    return found


STATED = {
    "own": UPRIGHT,
    "missing": (None, None),
    "zero": (0, 0),
    "null height": (90, None),
    "negative": (-90, 60),
    "half": (45, 30),
    "twice as text": ("180", "120"),
    "squashed": (90, 90),
}


@pytest.mark.parametrize("stated", STATED)
def test_the_stated_size_counts_where_there_is_one(stated: str) -> None:
    width, height = STATED[stated]
    frame = box_frame(read_header(painted(None)), width, height)
    scale = {"half": (0.5, 0.5), "twice as text": (2, 2), "squashed": (1, 1.5)}
    across, down = scale.get(stated, (1, 1))
    rows = [[PLACE[0] * across, PLACE[1] * down, PLACE[2] * across, PLACE[3] * down]]
    assert frame.from_xyxy(rows)[0] == pytest.approx((0.1, 0.1, 0.4, 0.8))
    remark = {"half": RESIZED, "twice as text": RESIZED, "squashed": OTHER_SHAPE}
    assert frame.remark == remark.get(stated, "")


@pytest.mark.parametrize(
    ("stated", "own"),
    [
        ((640, 427), (320, 214)),
        ((640, 427), (320, 213)),
        ((1000, 667), (500, 334)),
        ((3, 2), (6, 4)),
    ],
)
def test_rounded_sides_are_the_same_shape(stated: tuple[int, int], own: tuple[int, int]) -> None:
    assert box_frame(Header(own, None), *stated).remark == RESIZED


@pytest.mark.parametrize(("stated", "own"), [((640, 480), (640, 427)), ((480, 640), (640, 480))])
def test_another_shape_is_noted(stated: tuple[int, int], own: tuple[int, int]) -> None:
    assert box_frame(Header(own, None), *stated).remark == OTHER_SHAPE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 0.5])
def test_boxes_of_the_stored_picture(orientation: int, scale: float) -> None:
    """Told by the stated size where it can be, and said by the user anywhere."""
    header = read_header(painted(orientation))
    assert header is not None
    stored_wh = turned(Image.new("L", UPRIGHT), orientation).size
    stated = [side * scale for side in stored_wh]
    rows = [[value * scale for value in place_before_turn(orientation)]]
    said = box_frame(header, *stated, boxes_of="stored").from_xyxy(rows)[0]
    assert said == pytest.approx((0.1, 0.1, 0.4, 0.8))
    told = box_frame(header, *stated)
    if orientation in (5, 6, 7, 8):
        assert told.from_xyxy(rows)[0] == said
        assert told.remark == TURNED
    else:
        assert told.turn is None
    if scale == 1:
        unstated = box_frame(header, None, None, boxes_of="stored").from_xyxy(rows)[0]
        assert unstated == said
        shares = [place_before_turn(orientation)[i] / stored_wh[i % 2] for i in range(4)]
        assert share_frame(header, 1.0, "stored").from_xyxy([shares])[0] == said


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_the_upright_picture(orientation: int) -> None:
    header = read_header(painted(orientation))
    for stated in (UPRIGHT, (None, None)):
        for boxes_of in ("stated", "upright"):
            frame = box_frame(header, *stated, boxes_of=boxes_of)
            assert frame.from_xyxy([PLACE])[0] == pytest.approx((0.1, 0.1, 0.4, 0.8))
            is_told = boxes_of == "upright" or (stated[0] and orientation in (5, 6, 7, 8))
            assert frame.remark == ("" if is_told or orientation == 1 else UNTOLD)
    # against what the stated size tells
    frame = box_frame(header, UPRIGHT[1], UPRIGHT[0], boxes_of="upright")
    assert frame.turn is None and frame.remark == OTHER_SHAPE


def test_a_size_that_tells_no_turn_leaves_boxes_upright() -> None:
    """A square, a half turn, a photo without a tag, the upright size."""
    square = read_header(encoded(Image.new("RGB", (64, 64)), orientation=6))
    wide = Image.new("RGB", (90, 60))

    def turn(orientation: int | None, stated: tuple[float, float]) -> Any:
        return box_frame(read_header(encoded(wide, orientation=orientation)), *stated).turn

    assert box_frame(square, 64, 64).turn is None
    assert turn(3, (90, 60)) is None
    assert turn(None, (60, 90)) is None
    assert turn(6, (90, 60)) is None
    assert turn(6, (60, 90)) is Image.Transpose.ROTATE_270
    assert turn(6, (30.0, 45.0)) is not None  # resized
    assert box_frame(None, 60, 90).turn is None


# segmentations

SQUARE = [20, 30, 80, 30, 80, 70, 20, 70]
CORNERS = [20.0, 30.0, 80.0, 70.0]


def runs_of(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a mask, by their definition."""
    flat = mask.T.ravel()
    counts, value = [0], 0
    for cell in flat:
        if cell != value:
            counts.append(0)
            value = cell
        counts[-1] += 1
    return counts


def mask_of(place: tuple[int, int, int, int], height: int = 100, width: int = 200) -> np.ndarray:
    x1, y1, x2, y2 = place
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


@pytest.mark.parametrize(
    "segmentation",
    [
        pytest.param([SQUARE], id="flat_list"),
        pytest.param(SQUARE, id="flat_list_alone"),
        pytest.param([[20, 30, 50, 30, 50, 70], [50, 30, 80, 30, 80, 70]], id="two_polygons"),
        pytest.param([[20, 30], [80, 30], [80, 70]], id="points"),
        pytest.param([[[20, 30], [80, 30], [80, 70]]], id="list_of_points"),
        pytest.param([{"x": 20, "y": 30}, {"x": "80", "y": "70"}], id="points_by_name"),
        pytest.param([[str(value) for value in SQUARE]], id="texts"),
        pytest.param(
            {"size": [100, 200], "counts": runs_of(mask_of((20, 30, 80, 70)))}, id="run_lengths"
        ),
    ],
)
def test_a_segmentation_is_enclosed(segmentation: Any) -> None:
    assert enclosing_corners(segmentation) == CORNERS
    row = {"segmentation": segmentation}
    for bbox in (None, [], [0, 0, 0, 0], [20, 30, None, 40]):
        assert xywh_of_annotation({**row, "bbox": bbox}) == [20, 30, 60, 40]
    assert xywh_of_annotation({**row, "bbox": [1, 2, 3, 4]}) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "segmentation",
    [None, [], [[]], [[1, 2, 3]], "abc", 7, [["a", "b"]], [[math.nan, 1, 2, 3]], [[[[[[[1, 2]]]]]]]]
    + [{}, {"size": [100, 200]}, {"size": [0, 0], "counts": [0, 5]}, {"size": 3, "counts": [1]}]
    + [{"size": [100, 200], "counts": counts} for counts in ([], [20000], 5, [-1, 5], [None], [{}])]
    + [{"size": [100, 200], "counts": text} for text in ("", "é", "o" * 1000, "\x00", "P")],
)
def test_what_is_no_segmentation(segmentation: Any) -> None:
    assert enclosing_corners(segmentation) is None
    assert xywh_of_annotation({"segmentation": segmentation, "bbox": "x"}) == "x"


def test_keypoints_are_no_box() -> None:
    assert xywh_of_annotation({"keypoints": [20, 30, 2, 80, 70, 2], "num_keypoints": 2}) is None


@given(st.integers(0, 10**6))
def test_run_lengths_are_what_pycocotools_encloses(seed: int) -> None:
    pycocotools_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 12, 2))
    mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    encoded_mask = pycocotools_mask.encode(np.asfortranarray(mask))
    x, y, w, h = pycocotools_mask.toBbox(encoded_mask).tolist()
    expected = [x, y, x + w, y + h] if mask.any() else None
    for counts in (runs_of(mask), encoded_mask["counts"], encoded_mask["counts"].decode()):
        assert enclosing_corners({"size": [height, width], "counts": counts}) == expected


# turned shapes


def turned_point(x: float, y: float, degrees: float, pivot: tuple[float, float]) -> Any:
    """Clockwise on a screen, whose y points down."""
    point = complex(x - pivot[0], y - pivot[1]) * cmath.rect(1, math.radians(degrees))
    return point.real + pivot[0], point.imag + pivot[1]


def around(points: Any) -> Any:
    xs, ys = zip(*points, strict=True)
    return pytest.approx([min(xs), min(ys), max(xs), max(ys)])


@pytest.mark.parametrize("degrees", [0, 30, 90, 123.4, 180, 270, -30, 359])
def test_turned_shapes_are_enclosed(degrees: float) -> None:
    x1, y1, x2, y2 = box = (20.0, 30.0, 80.0, 50.0)
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    for about_corner, pivot in ((False, (50.0, 40.0)), (True, (x1, y1))):
        expected = around(turned_point(*corner, degrees, pivot) for corner in corners)
        assert around_turned(box, degrees, about_corner=about_corner) == expected
    angles = np.linspace(0, 2 * math.pi, 100_001)
    rim = zip(50 + 30 * np.cos(angles), 40 + 10 * np.sin(angles), strict=True)
    expected = around(turned_point(x, y, degrees, (50.0, 40.0)) for x, y in rim)
    assert around_ellipse((50, 40), ("30", 10), degrees) == expected


def test_what_is_no_turned_shape() -> None:
    for values in (around_turned([1, 2, None, 4], 30), around_turned([1, 2, 3, 4], "x")):
        assert all(map(math.isnan, values))
    assert all(map(math.isnan, around_ellipse((1, 2), (-3, 4))))
    x1, y1, x2, y2 = around_turned([80, 30, 20, 50], 10)
    assert x1 > x2 and y1 < y2  # inverted before, inverted after


def test_a_box_that_cvat_turned() -> None:
    row = {"bbox": [20, 30, 60, 20], "segmentation": []}
    for attributes in ({"rotation": 0.0}, {"rotation": 360}, {"occluded": True}, {}, None, [3]):
        assert xywh_of_annotation({**row, "attributes": attributes}) == [20, 30, 60, 20]
    turned = {**row, "attributes": {"occluded": False, "rotation": 90.0}}
    assert xywh_of_annotation(turned) == pytest.approx([40, 10, 20, 60])
    assert xywh_of_annotation({**turned, "segmentation": [SQUARE]}) == [20, 30, 60, 20]


@pytest.mark.parametrize(
    ("order", "row"),
    [
        ("xyxy", [10, 20, 30, 60]),
        ("xywh", [10, 20, 20, 40]),
        ("cxcywh", [20, 40, 20, 40]),
        ("yxyx", [20, 10, 60, 30]),
    ],
)
def test_declared_orders(order: Any, row: list[float]) -> None:
    (box,) = box_frame(None, 100, 200).from_order([row], order)
    assert box == pytest.approx((0.1, 0.1, 0.3, 0.3))
