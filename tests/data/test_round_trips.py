"""Every format: sample -> record -> drawn -> written in its own format -> read again: equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.data.drawing import draw_record
from cloc_mllm.data.records import DropLog, Record
from tests.data.formats import COLORS, FORMATS, Format, color_index, painted_records, write_images
from tests.photos import encoded, turned


def assert_equal_records(actual: list[Record], expected: list[Record]) -> None:
    """Equal in all but the boxes' last digits (annotations are decimal numbers)."""
    assert [record.id for record in actual] == [record.id for record in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        for mine, other in zip(ours.regions, theirs.regions, strict=True):
            assert mine.box == pytest.approx(other.box, abs=1e-6)
            assert replace(mine, box=other.box) == other
        assert replace(ours, regions=theirs.regions) == theirs


def assert_boxes_lie_on_their_colors(records: list[Record]) -> None:
    for record in records:
        image = record.load_image()
        for region in record.regions:
            x1, y1, x2, y2 = region.box
            pixels = [round(x1 * image.width), round(y1 * image.height)]
            pixels += [round(x2 * image.width), round(y2 * image.height)]
            inside = image.crop(tuple(pixels))
            color = COLORS[color_index(region)]
            assert inside.getcolors() == [(inside.width * inside.height, color)], record.id
            for side, step in ((0, -1), (1, -1), (2, 1), (3, 1)):
                grown = list(pixels)
                grown[side] += step
                assert len(image.crop(tuple(grown)).getcolors() or []) > 1, "the box is too small"


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
def test_round_trip(form: Format, tmp_path: Path) -> None:
    painted = painted_records()
    folders = [tmp_path / "first", tmp_path / "again"]
    for folder in folders:
        write_images(painted, folder)
    log = DropLog()
    form.write(painted, folders[0])
    first = list(form.read(folders[0], log))
    assert [record.id for record in first] == ["1", "2", "3", "4"]
    assert log.counts == {}
    assert sum(len(record.regions) for record in first) == 10
    assert_boxes_lie_on_their_colors(first)
    for record in first:
        assert max(draw_record(record).size) == 640
    form.write(first, folders[1])
    again = list(form.read(folders[1], DropLog()))
    assert_equal_records(again, first)


# their annotations state the image's size, so they tell a photo's frame before its turn
STATE_A_SIZE = [
    *("coco", "refcoco", "refer", "mdetr", "qwen_vl_lines", "odvg_detection", "odvg_grounding"),
    *("pascal_voc", "flickr30k_entities", "ferret", "cvat", "label_studio", "label_studio_min"),
    *("labelme", "hf_rows", "hf_disk"),
]


def before_turn(record: Record, orientation: int) -> Record:
    """The record as a tool that ignores EXIF sees it: picture and boxes as the camera stored them.

    Each box is turned by painting it, not by the arithmetic under test.
    """
    image = record.load_image()
    regions = []
    for region in record.regions:
        x1, y1, x2, y2 = region.box
        mask = Image.new("L", image.size)
        corners = (x1 * image.width, y1 * image.height, x2 * image.width, y2 * image.height)
        mask.paste(255, tuple(map(round, corners)))
        mask = turned(mask, orientation)
        left, top, right, bottom = mask.getbbox()
        sides = mask.width, mask.height
        box = (left / sides[0], top / sides[1], right / sides[0], bottom / sides[1])
        regions.append(replace(region, box=box))
    width, height = turned(image, orientation).size
    return replace(record, width=width, height=height, regions=regions)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("name", STATE_A_SIZE)
def test_boxes_annotated_before_the_exif_turn_are_turned(
    name: str, orientation: int, tmp_path: Path
) -> None:
    (form,) = [form for form in FORMATS if form.name == name]
    painted = painted_records()[:3]  # the fourth is square: its size tells nothing
    photos = [
        replace(record, image=encoded(record.load_image(), orientation=orientation))
        for record in painted
    ]
    for frame, annotated in (
        ("stored", [before_turn(record, orientation) for record in photos]),
        ("upright", photos),
    ):
        folder = tmp_path / frame
        write_images(photos, folder)
        form.write(annotated, folder)
        log = DropLog()
        read = list(form.read(folder, log))
        assert log.counts == {}
        assert sum(len(record.regions) for record in read) == 6
        assert_boxes_lie_on_their_colors(read)
