"""Open Images' tables of boxes and class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.data.readers.open_images import read_open_images
from cloc_mllm.data.records import DropLog, Record

HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,"
    "IsDepiction,IsInside"
)
CAT = "/m/01yrx,1,0.1,0.3,0.2,0.6,0,0"


def read(
    folder: Path, rows: list[str], classes: str = "/m/01yrx,Cat\n", **options: Any
) -> tuple[list[Record], DropLog]:
    for name in ("000a", "000b"):
        Image.new("RGB", (200, 100), "green").save(folder / f"{name}.jpg")
    (folder / "boxes.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (folder / "classes.csv").write_text(classes)
    log = DropLog()
    paths = folder / "boxes.csv", folder / "classes.csv", folder
    return list(read_open_images(*paths, drop_log=log, **options)), log


@pytest.mark.parametrize("header", ["", "LabelName,DisplayName\n"])
def test_boxes(header: str, tmp_path: Path) -> None:
    """Rows of one image need not stand together."""
    rows = [f"{name},xclick,{CAT},0,0,0" for name in ("000a", "000b", "000a")]
    records, log = read(tmp_path, rows, f"{header}/m/01yrx,Cat\n/m/0bt9lr,Dog\n")
    assert [(record.id, len(record.regions)) for record in records] == [("000a", 2), ("000b", 1)]
    region = records[0].regions[0]
    assert (region.phrase, region.category, region.score) == ("Cat", "Cat", 1.0)
    assert region.box == pytest.approx((0.1, 0.2, 0.3, 0.6))
    assert log.counts == {}


def test_groups_are_set_aside_unless_kept(tmp_path: Path) -> None:
    rows = [f"000a,xclick,{CAT},1,0,0", f"000a,xclick,{CAT},0,0,0"]
    (record,), log = read(tmp_path, rows)
    assert (len(record.regions), log.set_aside) == (1, {"region": {"crowd": 1}})
    (record,), log = read(tmp_path, rows, keep_crowd=True)
    assert (len(record.regions), log.set_aside) == (2, {})


def test_what_cannot_be_used(tmp_path: Path) -> None:
    rows = [
        "000a,activemil,/m/01yrx,0.5,0.1,0.3,0.2,0.6,0,0,0,0,0",
        f"000a,xclick,{CAT.replace('01yrx', 'unknown')},0,0,0",
        f",xclick,{CAT},0,0,0",
        "000a,xclick,/m/01yrx,1,0.3,0.1,0.2,0.6,0,0,0,0,0",
    ]
    (record,), log = read(tmp_path, rows)
    assert [region.score for region in record.regions] == [0.5]
    assert log.counts == {"region": {"unknown_category": 1, "bad_row": 1, "inverted": 1}}


def test_images_not_asked_for(tmp_path: Path) -> None:
    rows = [f"{name},xclick,{CAT},0,0,0" for name in ("000a", "000b", "gone", "gone")]
    (record,), log = read(tmp_path, rows, ids=["000b"])
    assert record.id == "000b"
    assert log.counts == {}
    assert log.set_aside == {"record": {"not_asked": 2}, "region": {"not_asked": 3}}


def test_other_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classes.csv: expected lines"):
        read(tmp_path, [], classes="\n")
    (tmp_path / "x.csv").write_text("ImageID,Source,LabelName,Confidence\n0,x,/m/01yrx,1\n")
    paths = tmp_path / "x.csv", tmp_path / "classes.csv", tmp_path
    (tmp_path / "classes.csv").write_text("/m/01yrx,Cat\n")
    with pytest.raises(ValueError, match=r"x.csv: .*XMin, YMin, XMax, YMax are missing"):
        list(read_open_images(*paths, drop_log=DropLog()))
