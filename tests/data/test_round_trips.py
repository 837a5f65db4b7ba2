"""Every format: sample -> record -> drawn -> written in its own format -> read again: equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloc_mllm.data.drawing import draw_record
from cloc_mllm.data.records import DropLog, Record
from tests.data.formats import COLORS, FORMATS, Format, color_index, painted_records, write_images


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
