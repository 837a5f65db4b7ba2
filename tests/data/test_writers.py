from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.data.commands import main
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.readers.grit import read_grit_tars
from cloc_mllm.data.readers.llava import read_llava
from cloc_mllm.data.readers.ms_swift import read_ms_swift
from cloc_mllm.data.records import DropLog, Record
from cloc_mllm.data.writers import safe_name
from cloc_mllm.data.writers.coco import write_coco
from cloc_mllm.data.writers.llava import write_llava
from cloc_mllm.data.writers.ms_swift import write_ms_swift
from cloc_mllm.data.writers.webdataset import write_webdataset
from tests.data.formats import painted_records

Write = Callable[[list[Record], Path], Any]
Read = Callable[[Path, DropLog], Any]


def read_coco_folder(folder: Path, log: DropLog) -> Any:
    captions = folder / "captions.json"
    return read_coco(folder / "instances.json", folder / "images", captions=captions, drop_log=log)


def with_source(record: Record, source: str, **region_changes: Any) -> Record:
    regions = [replace(region, **region_changes) for region in record.regions]
    return replace(record, source=source, regions=regions)


@pytest.fixture(params=["painted", "scenes"])
def records(request: pytest.FixtureRequest) -> list[Record]:
    if request.param == "painted":
        return painted_records()
    scenes: list[Record] = request.getfixturevalue("tiny_scenes")
    return scenes


def assert_close(actual: list[Record], expected: list[Record], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        for mine, other in zip(ours.regions, theirs.regions, strict=True):
            assert mine.box == pytest.approx(other.box, abs=tolerance)
        boxes = [region.box for region in theirs.regions]
        regions = [replace(r, box=b) for r, b in zip(ours.regions, boxes, strict=True)]
        assert replace(ours, regions=regions) == theirs


def test_coco(records: list[Record], tmp_path: Path) -> None:
    write_coco(records, tmp_path / "out")
    log = DropLog()
    expected = [
        replace(
            record,
            source="coco",
            regions=[
                replace(
                    r,
                    phrase=r.category or r.phrase,
                    category=r.category or r.phrase,
                    expressions=[],
                    group="",
                )
                for r in record.regions
            ],
        )
        for record in records
    ]
    assert_close(list(read_coco_folder(tmp_path / "out", log)), expected, 1e-6)
    assert log.counts == {}


@pytest.mark.parametrize("frame", ["padded", "original"])
def test_llava(records: list[Record], tmp_path: Path, frame: Any) -> None:
    write_llava(records, tmp_path / "out", frame=frame, decimals=6)
    log = DropLog()
    rows, images = tmp_path / "out" / "llava.json", tmp_path / "out" / "images"
    actual = list(read_llava(rows, images, frame=frame, drop_log=log))
    expected = [
        replace(with_source(r, "llava", category="", group=""), captions=[]) for r in records
    ]
    assert_close(actual, expected, 1e-5)
    assert log.counts == {}


def test_ms_swift(records: list[Record], tmp_path: Path) -> None:
    write_ms_swift(records, tmp_path / "out")
    log = DropLog()
    actual = list(read_ms_swift(tmp_path / "out" / "rows.jsonl", tmp_path / "out", drop_log=log))
    expected = [
        replace(with_source(r, "ms-swift", category="", group=""), captions=[], id=f"images/{r.id}")
        for r in records
    ]
    assert_close(actual, expected, 1e-5)
    assert log.counts == {}


@pytest.mark.parametrize(
    "write",
    [write_coco, lambda records, out: write_llava(records, out, frame="original"), write_ms_swift],
    ids=["coco", "llava", "ms-swift"],
)
def test_negative_zero_is_written_as_zero(write: Write, tmp_path: Path) -> None:
    (record,) = painted_records()[:1]
    region = replace(record.regions[0], box=(-0.0, -1e-9, 0.5, 0.5))
    write([replace(record, regions=[region])], tmp_path / "out")
    written = [path.read_text() for path in (tmp_path / "out").rglob("*.json*")]
    assert written and not any("-0" in text for text in written)


def test_webdataset_keeps_the_whole_record(records: list[Record], tmp_path: Path) -> None:
    write_webdataset(records, tmp_path / "out", shard_size=3)
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert len(tars) == -(-len(records) // 3)
    log = DropLog()
    expected = [with_source(record, "grit") for record in records]
    assert_close(list(read_grit_tars(tars, drop_log=log)), expected, 0)
    with tarfile.open(tars[0]) as archive:
        row = json.load(archive.extractfile(archive.getnames()[2]))  # type: ignore[arg-type]
    for start, end, *_ in row["noun_chunks"]:
        assert row["caption"][start:end] in [region.phrase for region in records[0].regions]


@pytest.mark.parametrize(
    "record_id",
    ["../../escape", "/etc/passwd", "a/../../b", "..", "", "a\0b", "x" * 3000, "ünï", "a.jpg", "~"],
)
def test_no_id_leaves_the_folder(record_id: str, tmp_path: Path) -> None:
    record = replace(painted_records()[0], id=record_id)
    target = tmp_path / "in" / "out"
    for number, write in enumerate((write_coco, write_ms_swift, write_webdataset)):
        write([record], target / str(number))  # type: ignore[operator]
    with_frame = target / "llava"
    write_llava([record], with_frame, frame="original")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert len(list(with_frame.rglob("*.png"))) == 1
    assert ".." not in safe_name(record_id)


def test_safe_names() -> None:
    assert safe_name("coco/train2017/000000033471") == "coco/train2017/000000033471"
    assert safe_name("a b") != safe_name("a_b") != safe_name("a?b")


@pytest.mark.parametrize("write", [write_coco, write_ms_swift, write_webdataset])
def test_a_failed_export_leaves_nothing(write: Any, tmp_path: Path) -> None:
    def records() -> Any:
        yield painted_records()[0]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write(records(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_taken_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        write_coco(painted_records(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        (["coco"], "instances.json"),
        (["llava", "--frame", "padded"], "llava.json"),
        (["ms-swift"], "rows.jsonl"),
        (["webdataset", "--shard-size", "2"], "00001.tar"),
    ],
)
def test_export_command(
    arguments: list[str], made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(painted_records(), tmp_path / "data")
    form, *options = arguments
    paths = [str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(["export", form, *paths, *options]) == 0
    assert (tmp_path / "out" / made).is_file()
    printed = capsys.readouterr().out
    assert "records:                     4" in printed
    assert "regions:                    10" in printed
