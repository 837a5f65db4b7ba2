"""`data build auto` names format and frame of COCO photos in every tool's layout, and builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.data.checks.judge import judge, the_one, verdict
from cloc_mllm.data.records import Record
from tests.data.layouts import LAYOUTS, Layout, coco_mini_records

# what the numbers are where the command does not say it
DECLARED = {
    "coco": ("pixels", "xywh"),
    "cvat": ("pixels", "xyxy"),
    "label-studio": ("0..100", "xyxy"),
    "labelme": ("pixels", "xyxy"),
    "via": ("pixels", "xyxy"),
    "yolo": ("0..1", "cxcywh"),
    "pascal-voc": ("pixels", "xyxy"),
    "open-images": ("0..1", "xyxy"),
    "hf-objects": ("pixels", "xywh"),
    "csv": ("pixels", "xyxy"),
}


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[Record]:
    return coco_mini_records(shared_data)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_format_and_frame_are_named(layout: Layout, photos: list[Record], tmp_path: Path) -> None:
    layout.write(photos, tmp_path)
    for path in (tmp_path, tmp_path / layout.entry):
        judgements = judge(path)
        found = the_one(judgements)
        assert found is not None, verdict(judgements)
        assert found.source == layout.command.split()[0]
        assert (found.reading.frame, found.reading.order) == DECLARED[found.source]
        assert len(found.items) == 79
        assert len(found.boxes) == 619
        assert found.share_missing == 0
