"""VIA's projects and exports, with every shape and kind of attribute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.data.readers.via import read_via
from cloc_mllm.data.records import DropLog, Record

RECT = {"name": "rect", "x": 20, "y": 20, "width": 40, "height": 40}
BOX = pytest.approx((0.1, 0.2, 0.3, 0.6))
SHAPES: dict[str, tuple[dict[str, Any], Any]] = {
    "rect": (RECT, BOX),
    "circle": ({"name": "circle", "cx": 40, "cy": 40, "r": 20}, BOX),
    "ellipse": (
        {"name": "ellipse", "cx": 40, "cy": 40, "rx": 10, "ry": 20, "theta": 1.5707963267948966},
        pytest.approx((0.1, 0.3, 0.3, 0.5)),
    ),
    "polygon": (
        {"name": "polygon", "all_points_x": [20, 60, 60], "all_points_y": [20, 20, 60]},
        BOX,
    ),
    "no_theta": ({"name": "ellipse", "cx": 40, "cy": 40, "rx": 20, "ry": 20}, BOX),
}


def region(shape: dict[str, Any], **attributes: Any) -> dict[str, Any]:
    return {"shape_attributes": shape, "region_attributes": attributes}


def images_of(regions: Any, **of_file: str) -> dict[str, Any]:
    row = {"filename": "a.png", "size": 99, "regions": regions, "file_attributes": of_file}
    return {"a.png99": row}


def read(folder: Path, table: Any, **options: Any) -> tuple[list[Record], DropLog]:
    Image.new("RGB", (200, 100), "green").save(folder / "a.png")
    name = "via.csv" if isinstance(table, str) else "via.json"
    (folder / name).write_text(table if isinstance(table, str) else json.dumps(table))
    log = DropLog()
    return list(read_via(folder / name, folder, drop_log=log, **options)), log


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, tmp_path: Path) -> None:
    stated, expected = SHAPES[shape]
    (record,), log = read(tmp_path, images_of([region(stated, label="cat")]))
    assert record.id == "a"
    assert [(r.phrase, r.category, r.box) for r in record.regions] == [("cat", "cat", expected)]
    assert log.counts == {}


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"name": "polyline", "all_points_x": [1, 2], "all_points_y": [1, 2]}, "no_box"),
        ({"name": "point", "cx": 1, "cy": 2}, "no_box"),
        ({"name": "spiral"}, "bad_row"),
        ({}, "bad_row"),
        ({"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1, 2]}, "not_finite"),
        ({"name": "circle", "cx": 1, "cy": 2, "r": None}, "not_finite"),
    ],
)
def test_what_has_no_box_is_counted(shape: Any, reason: str, tmp_path: Path) -> None:
    (record,), log = read(tmp_path, images_of([region(shape, label="cat")]))
    assert record.regions == []
    assert log.counts == {"region": {reason: 1}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cat", ["cat"]),
        ({"cat": True, "dog": False, "bird": True}, ["cat", "bird"]),  # a checkbox
        ({"cat": False}, []),
        ("", []),
    ],
)
def test_kinds_of_attributes(value: Any, expected: list[str], tmp_path: Path) -> None:
    (record,), log = read(tmp_path, images_of([region(RECT, label=value)]))
    assert [r.phrase for r in record.regions] == expected
    assert log.counts == ({} if expected else {"region": {"empty_text": 1}})


def test_the_attribute_is_chosen_where_there_are_several(tmp_path: Path) -> None:
    table = images_of([region(RECT, label="cat", colour="red")])
    with pytest.raises(ValueError, match=r"label, colour; say which .*--phrase_attribute"):
        read(tmp_path, table)
    (record,), _ = read(tmp_path, table, phrase_attribute="colour")
    assert record.regions[0].phrase == "red"


def test_via_1_numbers_its_regions(tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, images_of({"0": region(RECT, label="cat")}))
    assert [r.box for r in record.regions] == [BOX]


def test_project_with_a_caption(tmp_path: Path) -> None:
    images = images_of([region(RECT, label="cat")], caption="A cat.", public_domain="no")
    (record,), _ = read(tmp_path, {"_via_settings": {}, "_via_img_metadata": images})
    assert record.captions == ["A cat."]
    assert len(record.regions) == 1


def test_csv_of_via_1_and_an_image_without_regions(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "b.png")
    shape = json.dumps(RECT).replace('"', '""')
    table = (
        "#filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
        "region_attributes\n"
        f'a.png,99,"{{}}",2,0,"{shape}","{{""label"":""cat""}}"\n'
        f'a.png,99,"{{}}",2,1,"{shape}","{{""label"":""dog""}}"\n'
        'b.png,98,"{}",0,0,"{}","{}"\n'
    )
    records, log = read(tmp_path, table)
    assert [[r.phrase for r in record.regions] for record in records] == [["cat", "dog"], []]
    assert log.counts == {}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"project": {}, "metadata": {}, "file": {}}, "is of VIA 3"),
        ({}, "expected VIA's project"),
        ([1], "expected VIA's project"),
        ("image,x\na.png,1\n", "expected VIA's columns, got image, x"),
        (
            "filename,region_count,region_shape_attributes,region_attributes\na.png,1,{,{}\n",
            "line 2: expected a JSON object",
        ),
    ],
)
def test_other_files_are_refused(table: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"via\..*{message}"):
        read(tmp_path, table)


def test_an_image_that_is_none_is_counted(tmp_path: Path) -> None:
    table = images_of([region(RECT, label="cat")]) | {"x": None, "y": {"regions": [1, 2]}}
    (_,), log = read(tmp_path, table)
    assert log.counts == {"record": {"bad_row": 2}, "region": {"bad_row": 2}}
