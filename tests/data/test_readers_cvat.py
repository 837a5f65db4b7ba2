"""CVAT for images 1.1, as a task with every kind of shape exports it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.data.readers.cvat import TAGS, read_cvat
from cloc_mllm.data.records import DropLog, Record

SHARED = 'source="manual" occluded="0"'
XML = f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <job>
      <id>7</id>
      <mode>annotation</mode>
      <labels><label><name>cat</name><attributes><attribute><name>words</name>
        <mutable>False</mutable><input_type>text</input_type></attribute></attributes></label>
      </labels>
    </job>
    <dumped>2024-05-01 10:00:00+00:00</dumped>
  </meta>
  <image id="0" name="night/a.png" subset="train" task_id="3" width="200" height="100">
    <box label="cat" {SHARED} xtl="20.00" ytl="20.00" xbr="60.00" ybr="60.00" z_order="0">
      <attribute name="words">the cat on the left</attribute>
      <attribute name="colour">red</attribute>
    </box>
    <box label="dog" {SHARED} xtl="40.00" ytl="30.00" xbr="80.00" ybr="40.00" rotation="90.00"
      z_order="0"><attribute name="words"></attribute></box>
    <polygon label="cat" {SHARED} points="20.00,20.00;60.00,30.00;40.00,60.00" z_order="0">
    </polygon>
    <ellipse label="cat" {SHARED} cx="40.00" cy="40.00" rx="20.00" ry="10.00" z_order="0">
    </ellipse>
    <mask label="cat" {SHARED} rle="5, 30, 5" left="20" top="20" width="10" height="4" z_order="0">
    </mask>
    <polyline label="cat" {SHARED} points="20.00,20.00;60.00,60.00" z_order="0"></polyline>
    <points label="cat" {SHARED} points="20.00,20.00" z_order="0"></points>
    <cuboid label="cat" {SHARED} xtl1="1" ytl1="1" z_order="0"></cuboid>
    <skeleton label="cat" source="manual" z_order="0">
      <points label="nose" {SHARED} outside="0" points="1.00,2.00"></points>
    </skeleton>
    <tag label="indoor" source="manual"></tag>
    <something label="cat"></something>
  </image>
  <image id="1" name="b.png" subset="train" task_id="3" width="200" height="100">
  </image>
</annotations>
"""


def put(folder: Path, xml: str = XML) -> Path:
    for name in ("night/a.png", "b.png"):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100), "green").save(path)
    (folder / "annotations.xml").write_text(xml)
    return folder


def read(folder: Path, annotations: str, **options: object) -> tuple[list[Record], DropLog]:
    log = DropLog()
    return list(read_cvat(folder / annotations, drop_log=log, **options)), log


def test_every_shape(tmp_path: Path) -> None:
    (record, empty), log = read(
        put(tmp_path), "annotations.xml", images=tmp_path / "images", expression_attribute="words"
    )
    assert (record.id, empty.id, empty.regions) == ("night/a", "b", [])
    assert [(region.phrase, region.box) for region in record.regions] == [
        ("cat", pytest.approx((0.1, 0.2, 0.3, 0.6))),
        ("dog", pytest.approx((0.275, 0.15, 0.325, 0.55))),  # turned about its centre
        ("cat", pytest.approx((0.1, 0.2, 0.3, 0.6))),
        ("cat", pytest.approx((0.1, 0.3, 0.3, 0.5))),
        ("cat", pytest.approx((0.1, 0.2, 0.15, 0.24))),
    ]
    assert [region.expressions for region in record.regions[:3]] == [
        ["the cat on the left"],
        [],
        [],
    ]
    assert log.counts == {"region": {"no_box": 4, "bad_row": 1}}
    assert log.notes == {TAGS: 1}


def test_expressions_only_where_asked_for(tmp_path: Path) -> None:
    records, _ = read(put(tmp_path), "annotations.xml", images=tmp_path / "images")
    assert not any(region.expressions for record in records for region in record.regions)


@pytest.mark.parametrize("place", ["annotations.xml", ".", "task.zip"])
def test_where_cvat_puts_it(place: str, tmp_path: Path) -> None:
    """The XML, the unpacked folder, or the zip, with the images in it."""
    put(tmp_path)
    if place == "task.zip":
        with zipfile.ZipFile(tmp_path / place, "w") as archive:
            for name in ("annotations.xml", "images/night/a.png", "images/b.png"):
                archive.write(tmp_path / name, name)
    records, _ = read(tmp_path, place)
    assert [len(record.regions) for record in records] == [5, 0]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotations><track id='0' label='cat'/></annotations>", 'of a video .*"CVAT for images'),
        ("<annotations><meta/></annotations>", "expected <annotations> with <image>"),
        ("<annotation><object/></annotation>", "got <annotation>"),
        ("<annotations>", "is not valid XML"),
        ("<!DOCTYPE x><annotations/>", "document type"),
    ],
)
def test_other_files_are_refused(xml: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"annotations.xml.*{message}"):
        read(put(tmp_path, xml), "annotations.xml")


def test_several_xml_files_are_refused(tmp_path: Path) -> None:
    put(tmp_path)
    (tmp_path / "other.xml").write_text(XML)
    with pytest.raises(ValueError, match=r"found annotations.xml, other.xml; name it"):
        read(tmp_path, ".")
