"""Boxes, frames, the transform, overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_iou, generalized_box_iou

from cloc_mllm.box import clip_box
from cloc_mllm.geometry import (
    CANVAS,
    Boxes,
    CanvasTransform,
    Frame,
    elementwise_giou,
    elementwise_iou,
)

SIZES = [(640, 480), (480, 640), (100, 100), (333, 77), (61, 199), (7, 500)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("width, height", SIZES)
def test_painted_rectangle_is_found_where_the_box_says(width: int, height: int, flip: bool) -> None:
    x1, y1, x2, y2 = width // 5, height // 4, width * 3 // 5, height * 3 // 4
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (x1, y1, x2, y2))
    transform = CanvasTransform(width, height, 224, flip)
    canvas = np.asarray(transform.apply(image, fill=(0, 0, 0)))[..., 0] > 127
    rows, columns = np.flatnonzero(canvas.any(1)), np.flatnonzero(canvas.any(0))
    actual = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    expected = transform.to_canvas(Boxes.pixels([[x1, y1, x2, y2]], width, height)).xyxy[0] * 224
    # one pixel: where a half-covered edge pixel falls is the resampling's choice
    np.testing.assert_allclose(actual, expected.numpy(), atol=1.0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("width, height", SIZES)
def test_letterbox_is_inverted_exactly(width: int, height: int, flip: bool) -> None:
    boxes = Boxes.normalized(torch.rand(20, 4, dtype=torch.float64))
    transform = CanvasTransform(width, height, 128, flip)
    back = transform.to_original(transform.to_canvas(boxes))
    torch.testing.assert_close(back.xyxy, boxes.xyxy, atol=1e-12, rtol=0)


def test_frames_convert_and_refuse() -> None:
    boxes = Boxes.pixels([[10, 20, 40, 60]], 100, 200)
    assert boxes.xyxy.tolist() == [[10, 20, 40, 60]]
    assert boxes.to_normalized().xyxy.tolist() == [[0.1, 0.1, 0.4, 0.3]]
    assert boxes.to_pixels(50, 100).xyxy.tolist() == [[5, 10, 20, 30]]
    with pytest.raises(ValueError, match="'canvas'"):
        Boxes(boxes.xyxy, CANVAS).to_normalized()
    with pytest.raises(ValueError, match="'pixels'"):
        CanvasTransform(10, 10, 8).to_original(boxes)
    with pytest.raises(ValueError, match="positive image size"):
        Frame.pixels(0, 10)
    with pytest.raises(ValueError, match=r"float\[R, 4\]"):
        Boxes.normalized(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="made for 10 x 10"):
        CanvasTransform(10, 10, 8).apply(Image.new("RGB", (9, 10)), (0, 0, 0))


def test_boxes_that_know_their_image_convert_without_its_size() -> None:
    boxes = Boxes.normalized([[0.1, 0.2, 0.5, 0.9]], image_wh=(100, 200))
    assert boxes.to_pixels().xyxy.tolist() == [[10, 40, 50, 180]]
    assert boxes.to_pixels(10, 10).xyxy.tolist() == [[1, 2, 5, 9]]
    assert boxes.to_pixels().to_normalized().image_wh == (100, 200)
    in_letterbox = CanvasTransform(100, 200, 32).to_canvas(boxes)
    assert CanvasTransform(100, 200, 32).to_original(in_letterbox).image_wh == (100, 200)
    with pytest.raises(ValueError, match=r"do not know the size of their image; .*image_wh="):
        Boxes.normalized([[0, 0, 1, 1]]).to_pixels()
    with pytest.raises(ValueError, match="pass both sides"):
        boxes.to_pixels(10)
    with pytest.raises(ValueError, match="'canvas'"):
        in_letterbox.to_pixels()


def test_boxes_in_other_notations() -> None:
    boxes = Boxes.pixels([[10, 20, 40, 60]], 100, 200)
    assert boxes.xywh.tolist() == [[10, 20, 30, 40]]
    assert boxes.cxcywh.tolist() == [[25, 40, 30, 40]]
    assert Boxes.normalized([]).xywh.shape == Boxes.normalized([]).cxcywh.shape == (0, 4)


@pytest.mark.parametrize("boxes", [Boxes.pixels, lambda xyxy, *wh: Boxes.normalized(xyxy, wh)])
def test_boxes_of_the_picture_before_its_turn_are_refused(boxes) -> None:
    boxes([[0, 0, 1, 1]], 60, 90).check_not_turned(60, 90)
    with pytest.raises(ValueError, match="of a 60 x 90 picture, but the upright one is 90 x 60"):
        boxes([[0, 0, 1, 1]], 60, 90).check_not_turned(90, 60)


def test_no_boxes_are_boxes() -> None:
    assert CanvasTransform(10, 20, 8).to_canvas(Boxes.normalized([])).xyxy.shape == (0, 4)


@pytest.mark.parametrize("turn", Image.Transpose)
def test_a_box_is_turned_with_its_picture(turn: Image.Transpose) -> None:
    picture = Image.new("L", (40, 20))
    picture.paste(255, (4, 2, 10, 18))
    boxes = Boxes.pixels([[4, 2, 10, 18]], 40, 20).to_normalized().turned(turn)
    moved = picture.transpose(turn)
    expected = moved.getbbox()
    assert boxes.to_pixels(*moved.size).xyxy[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 10, 20, 30), (0.1, 0.1, 0.2, 0.3)),
        ((-5, -5, 20, 30), (0.0, 0.0, 0.2, 0.3)),
        ((10, 10, 500, 500), (0.1, 0.1, 1.0, 1.0)),
        ((float("nan"), 0, 1, 1), "not_finite"),
        ((0, 0, float("inf"), 1), "not_finite"),
        ((20, 10, 10, 30), "inverted"),
        ((10, 10, 10, 30), "zero_area"),
        ((200, 10, 300, 30), "outside"),
        ((-30, 10, -10, 30), "outside"),
        ((10, 10, 10.5, 30), "too_small"),
        ((99.5, 10, 150, 30), "too_small"),
    ],
)
def test_clip_box(box: tuple[float, ...], expected: object) -> None:
    cleaned, reason = clip_box(box, 100, 100)
    assert (cleaned or reason) == expected


def _random_boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2, dtype=torch.float64)
    return torch.cat([corner, corner + torch.rand(count, 2, dtype=torch.float64)], 1)


def test_overlap_equals_torchvision() -> None:
    a, b = _random_boxes(40), _random_boxes(40)
    torch.testing.assert_close(elementwise_iou(a, b), box_iou(a, b).diagonal())
    torch.testing.assert_close(elementwise_giou(a, b), generalized_box_iou(a, b).diagonal())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=8, max_size=8))
def test_overlap_of_any_boxes_is_a_share(values: list[float]) -> None:
    a, b = torch.tensor(values, dtype=torch.float64).view(2, 1, 4)
    iou, giou = elementwise_iou(a, b).item(), elementwise_giou(a, b).item()
    assert 0 <= iou <= 1
    assert giou == giou and giou <= iou + 1e-9


def test_degenerate_boxes_overlap_nothing() -> None:
    flat, inverted = torch.tensor([[0.1, 0.1, 0.1, 0.5]]), torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    full = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert elementwise_iou(flat, flat).item() == 0
    assert elementwise_iou(inverted, full).item() == 0
