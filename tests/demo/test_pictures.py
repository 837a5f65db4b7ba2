"""Clicks, drawing and uploads: plain functions, no Gradio."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloc_mllm.data.images import MAX_IMAGE_PIXELS
from cloc_mllm.data.records import Record
from cloc_mllm.demo.pictures import (
    MAX_SIDE_PX,
    Outline,
    Picture,
    clear_box,
    click,
    draw,
    example_pictures,
    new_picture,
    open_picture,
    suggest,
)


@pytest.fixture
def picture() -> Picture:
    return new_picture(Image.new("RGB", (200, 100), "gray"))


@pytest.mark.parametrize(
    "corners",
    [[(20, 10), (100, 60)], [(100, 60), (20, 10)], [(20, 60), (100, 10)]],
    ids=["down-right", "up-left", "up-right"],
)
def test_two_clicks_in_any_order_are_one_box(
    picture: Picture, corners: list[tuple[int, int]]
) -> None:
    marked = click(picture, *corners[0])
    assert marked.corner is not None and marked.box is None
    boxed = click(marked, *corners[1])
    assert boxed.corner is None
    assert boxed.box == pytest.approx((0.1, 0.1, 0.5, 0.6))


def test_third_click_starts_a_new_box(picture: Picture) -> None:
    boxed = click(click(picture, 20, 10), 100, 60)
    again = click(boxed, 30, 30)
    assert again.box is None
    assert again.corner == pytest.approx((0.15, 0.3))
    assert clear_box(again) == clear_box(boxed) == picture


@pytest.mark.parametrize(
    ("x", "y"), [(-1, 5), (201, 5), (5, 101), (float("nan"), 5), (5, float("inf")), (1e308, 1e308)]
)
def test_click_outside_is_refused(picture: Picture, x: float, y: float) -> None:
    with pytest.raises(ValueError, match="outside the 200 x 100 picture"):
        click(picture, x, y)


def test_double_click_is_no_box(picture: Picture) -> None:
    with pytest.raises(ValueError, match="opposite corner"):
        click(click(picture, 50, 50), 51, 90)


def test_drawing_marks_the_box_and_leaves_the_picture_alone(picture: Picture) -> None:
    before = picture.image.tobytes()
    drawn = draw(picture, [Outline((0.25, 0.5, 0.75, 0.9), (255, 0, 0), "thing")])
    assert picture.image.tobytes() == before
    red = np.asarray(drawn) == (255, 0, 0)
    assert red.all(-1)[70, 50] and red.all(-1)[70, 149]  # left and right side
    assert not red.all(-1)[70, 100]  # the inside stays visible


@pytest.mark.parametrize(
    "box", [(-3.0, -3.0, 4.0, 4.0), (0.5, 0.5, 0.5, 0.5), (0.999, 0.999, 1.0, 1.0), (0, 0, 1, 0)]
)
def test_any_finite_box_can_be_drawn(picture: Picture, box: tuple) -> None:
    drawn = draw(picture, [Outline(box, (255, 0, 0), "a long tag " * 20)])
    assert drawn.size == picture.image.size


def test_corner_is_visible(picture: Picture) -> None:
    assert draw(click(picture, 100, 50)).tobytes() != picture.image.tobytes()


def test_large_pictures_are_shrunk_and_equal_ones_share_a_key() -> None:
    large = Image.new("RGB", (3000, 1500), "navy")
    first, second = new_picture(large), new_picture(large.copy())
    assert first.image.size == (MAX_SIDE_PX, MAX_SIDE_PX // 2)
    assert large.size == (3000, 1500)
    assert first.key == second.key
    assert new_picture(Image.new("RGB", (3, 4))).key != new_picture(Image.new("RGB", (4, 3))).key


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def test_upload_is_turned_upright_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.new("RGB", (60, 40)), tmp_path / "a.jpg", exif=exif)
    assert open_picture(path).image.size == (40, 60)


@pytest.mark.parametrize("name", ["html.jpg", "drawing.gif", "half.png", "empty.png"])
def test_what_is_no_picture_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(encoded, "GIF" if name.endswith("gif") else "PNG")
    contents = {
        "html.jpg": b"<html><script>alert(1)</script>",
        "drawing.gif": encoded.getvalue(),
        "half.png": encoded.getvalue()[:900],
        "empty.png": b"",
    }
    (tmp_path / name).write_bytes(contents[name])
    with pytest.raises(ValueError, match="your upload"):
        open_picture(tmp_path / name)


def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    side = int(MAX_IMAGE_PIXELS**0.5) + 8
    path = save(Image.new("1", (side, side)), tmp_path / "bomb.png")
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="image_too_large"):
        open_picture(path)


def test_examples_are_large_and_have_something_to_ask() -> None:
    pictures = example_pictures(2)
    assert [max(picture.image.size) for picture in pictures] == [512, 512]
    assert all(1 <= len(picture.suggestions) <= 4 for picture in pictures)


def test_photos_are_examples_too() -> None:
    pictures = example_pictures(8, "photos")
    assert [max(picture.image.size) for picture in pictures] == [480] * 8
    assert pictures[0].suggestions == ("the dog", "the fire hydrant")


def test_suggestions_are_varied_and_have_answers(tiny_scenes: list[Record]) -> None:
    for scene in tiny_scenes:
        expressions = [text for region in scene.regions for text in region.expressions]
        suggestions = suggest(scene)
        assert set(suggestions) <= set(expressions)
        assert len(suggestions) == len(set(suggestions)) == min(4, len(set(expressions)))
