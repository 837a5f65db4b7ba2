"""The 79 photos of COCO as tools export them, read back by the command that a user types."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from cloc_mllm.data.build import add_build
from cloc_mllm.data.records import DropLog, Record
from tests.data.layouts import LAYOUTS, Layout, class_name, coco_mini_records, corners_px


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[Record]:
    return coco_mini_records(shared_data)


def read(layout: Layout, folder: Path) -> tuple[list[Record], DropLog]:
    parser = argparse.ArgumentParser()
    add_build(parser.add_subparsers())
    arguments = ["build", *layout.argv(folder), "--output_dir", str(folder / "out")]
    args, log = parser.parse_args(arguments), DropLog()
    return list(args.read(args, log)), log


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_photos_come_back(layout: Layout, photos: list[Record], tmp_path: Path) -> None:
    layout.write(photos, tmp_path)
    records, log = read(layout, tmp_path)
    assert log.counts == {}
    by_image = {record.image: record for record in records}
    assert len(records) == len(by_image) == len(photos) == 79
    assert log.delivered["region"] == sum(len(photo.regions) for photo in photos) == 619
    for photo in photos:
        record = by_image[photo.image]
        assert [r.phrase for r in record.regions] == [class_name(r) for r in photo.regions]
        for actual, expected in zip(record.regions, photo.regions, strict=True):
            assert corners_px(record, actual) == pytest.approx(
                corners_px(photo, expected), abs=layout.tolerance_px, rel=0
            )


def test_the_page_shows_commands_that_parse(project_root: Path) -> None:
    page = (project_root / "docs" / "how-to" / "annotations.md").read_text()
    commands = re.findall(r"`cloc-mllm data (build [a-z][^`]+)`", page)
    assert len(commands) > 20
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_build(parser.add_subparsers())
    for command in commands:
        parser.parse_args([*command.split(), "--output_dir", "out"])
    shown = {command.removeprefix("build ") for command in commands}
    shown |= {"via --annotations via.json --images images"}  # as its CSV
    shown |= {layout.command for layout in LAYOUTS if layout.name == "hf_rows"}  # rarely met
    assert {layout.command for layout in LAYOUTS} <= shown
