"""Uploads and examples: plain functions, no Gradio."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.data.images import MAX_IMAGE_PIXELS
from cloc_mllm.data.records import Record
from cloc_mllm.demo.pictures import (
    MAX_SIDE_PX,
    example_pictures,
    new_picture,
    open_picture,
    suggest,
)


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


@pytest.mark.parametrize("name", ["html.jpg", "half.png", "empty.png"])
def test_what_is_no_picture_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(encoded, "PNG")
    contents = {
        "html.jpg": b"<html><script>alert(1)</script>",
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


@pytest.mark.parametrize(("first", "side"), [("photos", 480), ("scenes", 512)])
def test_examples_have_something_to_ask(first: str, side: int) -> None:
    pictures = example_pictures(first)
    assert max(pictures[0].image.size) == side
    assert sorted(max(picture.image.size) for picture in pictures) == [480] * 8 + [512] * 4
    assert all(1 <= len(picture.suggestions) <= 4 for picture in pictures)
    for picture in pictures:
        assert {phrase for phrase, _ in picture.references} >= set(picture.suggestions)


def test_photos_come_with_their_licence() -> None:
    photos = example_pictures("photos")[:8]
    assert photos[0].suggestions == ("the dog", "the fire hydrant")
    for photo in photos:
        address, licence = photo.credit
        assert address.startswith("https://www.flickr.com/") and licence.startswith("CC BY")


def test_suggestions_are_varied_and_have_answers(tiny_scenes: list[Record]) -> None:
    for scene in tiny_scenes:
        expressions = [text for region in scene.regions for text in region.expressions]
        suggestions = suggest(scene)
        assert set(suggestions) <= set(expressions)
        assert len(suggestions) == len(set(suggestions)) == min(4, len(set(expressions)))
