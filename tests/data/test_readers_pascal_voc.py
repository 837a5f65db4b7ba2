from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.data.readers.pascal_voc import read_pascal_voc
from cloc_mllm.data.records import DropLog, Record


def to_bndbox(x1: object, y1: object, x2: object, y2: object) -> str:
    return f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"


OBJECT = f"<object><name>cat</name>{to_bndbox(20, 30, 80, 70)}</object>"
SIZE = "<size><width>200</width><height>100</height></size>"


def put_image(folder: Path, name: str, color: str = "red") -> None:
    path = folder / "JPEGImages" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 100), color).save(path)


def put_xml(folder: Path, name: str, content: str) -> None:
    path = folder / "Annotations" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{content}</annotation>")


def read(folder: Path) -> tuple[list[Record], DropLog]:
    log = DropLog()
    paths = folder / "Annotations", folder / "JPEGImages"
    return list(read_pascal_voc(*paths, zero_based=True, drop_log=log)), log


@pytest.mark.parametrize(
    ("image", "xml", "file_name"),
    [
        pytest.param("a.jpg", "a.xml", "a.jpg", id="as_it_should_be"),
        pytest.param("a.JPG", "a.xml", "a.JPG", id="upper_case"),
        pytest.param("A.JPG", "a.xml", "", id="upper_case_alone"),
        pytest.param("a.jpg", "a.XML", "b.jpg", id="a_forgotten_filename"),
        pytest.param("photo one.jpg", "0001.xml", "photo one.jpg", id="by_filename"),
        pytest.param("photo one.jpg", "0001.xml", "photo one", id="by_filename_without_suffix"),
        pytest.param("photo.jpg", "0001.xml", "C:\\me\\photo.jpg", id="by_a_foreign_path"),
        pytest.param("a.bmp", "a.xml", "a.jpg", id="another_suffix"),
        pytest.param("train/a.jpg", "train/a.xml", "a.jpg", id="folders_below"),
        pytest.param("day/a.jpg", "a.xml", "a.jpg", id="deeper"),
    ],
)
def test_the_image_of_an_xml(image: str, xml: str, file_name: str, tmp_path: Path) -> None:
    put_image(tmp_path, image)
    put_xml(tmp_path, xml, f"<filename>{file_name}</filename>{SIZE}{OBJECT}")
    (record,), log = read(tmp_path)
    assert record.id == xml[:-4]
    assert record.regions[0].box == pytest.approx((0.1, 0.3, 0.4, 0.7))
    assert log.counts == {}


def test_each_xml_has_its_own_image_whatever_filename_says(tmp_path: Path) -> None:
    for name, color in (("a", "red"), ("b", "blue")):
        put_image(tmp_path, f"{name}.png", color)
        put_xml(tmp_path, f"{name}.xml", f"<filename>a.png</filename>{SIZE}{OBJECT}")
    records, _ = read(tmp_path)
    colors = [record.load_image().getpixel((0, 0)) for record in records]
    assert colors == [(255, 0, 0), (0, 0, 255)]


def test_several_boxes_of_one_object(tmp_path: Path) -> None:
    put_image(tmp_path, "a.png")
    boxes = to_bndbox(20, 30, 80, 70) + to_bndbox(100, 30, 160, 70)
    part = f"<part><name>head</name>{to_bndbox(1, 2, 3, 4)}</part>"
    put_xml(tmp_path, "a.xml", f"{SIZE}<object><name>cats</name>{boxes}{part}</object>{OBJECT}")
    (record,), log = read(tmp_path)
    assert [(r.phrase, r.group) for r in record.regions] == [
        ("cats", "a/0"),
        ("cats", "a/0"),
        ("cat", ""),
    ]
    assert record.regions[1].box == pytest.approx((0.5, 0.3, 0.8, 0.7))
    assert log.counts == {}


def test_what_an_object_lacks_is_told(tmp_path: Path) -> None:
    put_image(tmp_path, "a.png")
    things = "<object><name>cat</name></object>" + f"<object>{to_bndbox(1, 2, 30, 40)}</object>"
    put_xml(tmp_path, "a.xml", SIZE + things)
    put_xml(tmp_path, "b.xml", "<object")
    (tmp_path / "Annotations" / "readme.md").write_text("?")
    _, log = read(tmp_path)
    assert log.counts == {
        "region": {"not_finite": 1, "empty_text": 1},
        "record": {"bad_annotation": 1},
    }
    assert log.drops[0].found == "no bndbox in a picture of 200 x 100"
    assert log.drops[-1].found.startswith("b.xml: ")
    assert log.notes["files among the annotations that are no XML by their name"] == 1
