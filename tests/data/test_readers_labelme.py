"""LabelMe's JSON files: shapes, ways to name an image, embedded images, what is counted."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.cli import main
from cloc_mllm.data.checks.judge import judge, the_one
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.readers.boxes import TURNED
from cloc_mllm.data.readers.labelme import DESCRIPTIONS, EMBEDDED, FLAGS, read_labelme
from cloc_mllm.data.records import DropLog, Record
from tests.photos import encoded

PICTURE = Image.new("RGB", (200, 100), "green")
BOX = pytest.approx((0.1, 0.2, 0.3, 0.6))


def shape(points: Any, kind: Any = "rectangle", label: Any = "cat", **more: Any) -> dict[str, Any]:
    shared = {"group_id": None, "description": "", "flags": {}}
    return {"label": label, "points": points, "shape_type": kind, **shared, **more}


RECTANGLE = shape([[20, 20], [60, 60]])


def table(*shapes: Any, path: Any = "a.png", **more: Any) -> dict[str, Any]:
    row = {"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": path}
    return {**row, "imageData": None, "imageHeight": 100, "imageWidth": 200, **more}


def put(folder: Path, row: Any, name: str = "a.json") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(row if isinstance(row, str) else json.dumps(row))


def read(folder: Path, **options: Any) -> tuple[list[Record], DropLog]:
    log = DropLog()
    return list(read_labelme(folder, drop_log=log, **options)), log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PICTURE.save(tmp_path / "a.png")
    return tmp_path


SHAPES = {
    "rectangle": RECTANGLE,
    "other_corners": shape([[60, 20], [20, 60]]),
    "last_corner_first": shape([[60, 60], [20, 20]]),
    "four_corners": shape([[20, 20], [60, 20], [60, 60], [20, 60]]),
    "polygon": shape([[20, 20], [60, 20], [60, 60]], "polygon"),
    "no_type": shape([[20, 20], [60, 20], [60, 60]], None),
    "circle": shape([[40, 40], [40, 20]], "circle"),
    "circle_by_a_slanted_point": shape([[40, 40], [52, 56]], "circle"),
    "mask": shape([[20, 20], [60, 60]], "mask", mask="iVBORw0KGgo="),
    "rotation": shape([[40, 20], [60, 40], [40, 60], [20, 40]], "rotation", direction=0.785),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, folder: Path) -> None:
    put(folder, table(SHAPES[name]))
    (record,), log = read(folder)
    assert (record.id, record.width, record.height) == ("a", 200, 100)
    assert [(r.phrase, r.category, r.box) for r in record.regions] == [("cat", "cat", BOX)]
    assert log.counts == {}


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        (shape([[20, 20]], "point"), "no_box"),
        (shape([[20, 20], [60, 60]], "line"), "no_box"),
        (shape([[20, 20], [60, 60], [70, 20]], "linestrip"), "no_box"),
        (shape([[20, 20], [60, 60]], "spiral"), "bad_row"),
        (shape([[20, 20], [60, 60]], ["rectangle"]), "bad_row"),
        ("a shape", "bad_row"),
        (shape([[20, 20], [60, 60]], label=""), "empty_text"),
        (shape([[20, 20], [60, 60]], label=None), "bad_text"),
        (shape([[220, 20], [260, 60]]), "outside"),
        (shape([[20, 20]]), "zero_area"),
        (shape([]), "not_finite"),
        (shape([[20, "?"], [60, 60]]), "not_finite"),
        (shape([[40, 40]], "circle"), "not_finite"),
    ],
)
def test_what_is_not_kept_is_counted(stated: Any, reason: str, folder: Path) -> None:
    put(folder, table(RECTANGLE, stated))
    (record,), log = read(folder)
    assert len(record.regions) == 1
    assert log.counts == {"region": {reason: 1}}


def test_files_that_are_not_of_labelme_are_counted(folder: Path) -> None:
    put(folder, table(RECTANGLE))
    put(folder, {"images": [], "annotations": [], "categories": []}, "coco.json")
    put(folder, "[1, 2]", "list.json")
    put(folder, '"a text"', "text.json")
    put(folder, '{"shapes": [', "cut.json")
    put(folder, table(RECTANGLE, RECTANGLE, path="b.png"), "b.json")
    records, log = read(folder)
    assert [record.id for record in records] == ["a"]
    reasons = {"other_layout": 3, "bad_annotation": 1, "missing_image": 1}
    assert log.counts == {"record": reasons, "region": {"missing_image": 2}}


@pytest.mark.parametrize(
    "path",
    ["../photos/x.png", "..\\photos\\x.png", "D:\\work\\photos\\x.png", "/work/photos/x.png"],
)
def test_paths_start_at_the_json(path: str, tmp_path: Path) -> None:
    for name in ("photos", "other"):
        (tmp_path / "set" / name).mkdir(parents=True)
    PICTURE.save(tmp_path / "set" / "photos" / "x.png")
    PICTURE.resize((20, 10)).save(tmp_path / "set" / "other" / "x.png")
    put(tmp_path, table(RECTANGLE, path=path), "set/labels/a.json")
    (record,), _ = read(tmp_path)
    assert (record.id, record.width) == ("set/labels/a", 200)
    (record,), _ = read(tmp_path / "set" / "labels", images=tmp_path / "set" / "photos")
    assert (record.id, record.width) == ("a", 200)


def test_an_image_is_not_that_of_another_folder(folder: Path) -> None:
    put(folder, table(RECTANGLE))
    put(folder, table(RECTANGLE), "x/a.json")
    records, log = read(folder)
    assert [record.id for record in records] == ["a"]
    assert log.counts["record"] == {"ambiguous_image": 1}


def test_embedded_images(tmp_path: Path) -> None:
    data = encoded(PICTURE)
    text = base64.b64encode(data).decode()
    put(tmp_path, table(RECTANGLE, imageData=text), "a.json")
    put(tmp_path, table(RECTANGLE, path="b.png", imageData="no base64!"), "b.json")
    (record,), log = read(tmp_path)
    assert record.image == data
    assert [region.box for region in record.regions] == [BOX]
    assert log.counts["record"] == {"broken_image": 1}
    assert log.notes[EMBEDDED] == 1
    (tmp_path / "b.json").unlink()
    found = the_one(judge(tmp_path))
    assert found is not None and found.source == "labelme" and len(found.items) == 1


def test_descriptions_groups_scores_and_flags(folder: Path) -> None:
    whole = shape([[20, 20], [60, 60]], group_id=1, description=" the left cat ", score=0.5)
    part = shape([[80, 20], [90, 60]], group_id=1)
    put(folder, table(whole, part, shape([[20, 20], [60, 60]], label="dog", group_id=1)))
    put(folder, table(path="a.png", flags={"night": True}), "b.json")
    (record, _), log = read(folder)
    assert [region.expressions for region in record.regions] == [[], [], []]
    assert [region.group for region in record.regions] == ["cat/1", "cat/1", ""]
    assert [region.score for region in record.regions] == [0.5, 1.0, 1.0]
    assert (log.notes[DESCRIPTIONS], log.notes[FLAGS]) == (1, 1)
    (record, _), log = read(folder, descriptions=True)
    assert [region.expressions for region in record.regions] == [["the left cat"], [], []]
    assert DESCRIPTIONS not in log.notes


def test_boxes_are_of_the_upright_picture(tmp_path: Path) -> None:
    """LabelMe turns a photo by its EXIF orientation; a size before the turn tells another tool."""
    (tmp_path / "a.jpg").write_bytes(encoded(PICTURE, "JPEG", orientation=6))  # stored 100 x 200
    put(tmp_path, table(RECTANGLE, path="a.jpg"))
    (record,), log = read(tmp_path)
    assert (record.width, record.height) == (200, 100)
    assert record.regions[0].box == BOX
    assert TURNED not in log.notes
    size = {"imageHeight": 200, "imageWidth": 100}
    put(tmp_path, table(shape([[10, 40], [30, 120]]), path="a.jpg", **size))
    (record,), log = read(tmp_path)
    assert record.regions[0].box == pytest.approx((0.4, 0.1, 0.8, 0.3))
    assert log.notes[TURNED] == 1


def test_auto_builds_a_zip_of_images_and_json_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", encoded(PICTURE))
            row = table(RECTANGLE, shape([[100, 10], [200, 100]]), path=f"{number}.png")
            archive.writestr(f"{number}.json", json.dumps(row))
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["data", "build", "auto", str(tmp_path / "set.zip"), *out]) == 0


@pytest.mark.parametrize("name", ["photos/a.json", "set.zip/photos/b.JSON"])
def test_one_file_is_recognised_and_built(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stem, suffix in (("a", ".json"), ("b", ".JSON")):
        put(tmp_path, table(RECTANGLE, path=f"{stem}.png"), f"photos/{stem}{suffix}")
        PICTURE.save(tmp_path / "photos" / f"{stem}.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in (tmp_path / "photos").iterdir():
            archive.write(path, f"photos/{path.name}")
    assert main(["data", "doctor", str(tmp_path / name)]) == 0
    assert "one reading fits: labelme" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["data", "build", "auto", str(tmp_path / name), "--output_dir", str(out)]) == 0
    (record,) = load_records(out)
    assert (record.id, record.regions[0].box) == (Path(name).stem, BOX)
    assert "no annotation names" not in capsys.readouterr().out  # the other photo is no loss


def test_the_files_of_a_folder_are_no_readings_of_their_own(folder: Path) -> None:
    put(folder, table(RECTANGLE))
    put(folder, table(RECTANGLE), "b.json")
    put(folder, "{", "broken.json")  # which the reading of the folder fails for
    judgements = judge(folder)
    assert [(of.source, bool(of.faults)) for of in judgements] == [
        ("labelme", True),
        ("unreadable", True),
    ]


def test_one_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*b.json"):
        read(folder / "b.json")
