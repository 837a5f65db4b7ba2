from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.data.readers.refcoco import read_refcoco
from cloc_mllm.data.records import DropLog, Record

PHOTO = "COCO_train2014_000000000005"


def make_row(**changes: Any) -> dict[str, Any]:
    row = {"img_id": f"{PHOTO}_1", "sents": "left cat", "bbox": [10, 10, 20, 20]}
    return {**row, "width": 100, "height": 50, **changes}


def read(folder: Path, rows: Any) -> tuple[list[Record], DropLog]:
    Image.new("RGB", (32, 32), "green").save(folder / f"{PHOTO}.jpg")
    (folder / "rows.json").write_text(json.dumps(rows))
    log = DropLog()
    return list(read_refcoco(folder / "rows.json", folder, drop_log=log)), log


def test_rows_of_one_photo(tmp_path: Path) -> None:
    rows = [
        make_row(),
        make_row(img_id=f"{PHOTO}_2", bbox=[0, 0, 50, 50], sents="big dog"),
        make_row(sents="the cat"),
        make_row(sents="left cat"),
    ]
    (record,), log = read(tmp_path, rows)
    assert (record.id, record.width, record.height, record.captions) == (PHOTO, 32, 32, [])
    cat, dog = record.regions
    assert cat.box == pytest.approx((0.1, 0.2, 0.3, 0.6))
    assert (cat.phrase, cat.expressions) == ("left cat", ["left cat", "the cat", "left cat"])
    assert (dog.phrase, dog.expressions) == ("big dog", ["big dog"])
    assert log.counts == {}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(make_row(bbox=[10, 10, 0, 20]), "zero_area", id="zero_area"),
        pytest.param(make_row(bbox=[50, 10, -20, 20]), "inverted", id="inverted"),
        pytest.param(make_row(bbox=[200, 10, 20, 20]), "outside", id="outside"),
        pytest.param(make_row(bbox=[float("nan")] * 4), "not_finite", id="nan"),
        pytest.param(make_row(bbox="10,10,20,20"), "not_finite", id="box_as_text"),
        pytest.param(make_row(sents=" "), "empty_text", id="blank"),
        pytest.param(make_row(sents=None), "bad_text", id="null_text"),
        pytest.param(make_row(img_id="COCO_train2014_000000000006_1"), "missing_image", id="photo"),
        pytest.param({"img_id": PHOTO}, "bad_row", id="missing_keys"),
        pytest.param(7, "bad_row", id="no_object"),
    ],
)
def test_bad_row_is_dropped(tmp_path: Path, row: Any, reason: str) -> None:
    (record,), log = read(tmp_path, [make_row(), row])
    assert [region.expressions for region in record.regions] == [["left cat"]]
    assert log.counts["expression"] == {reason: 1}


def test_phrase_is_the_first_usable_expression(tmp_path: Path) -> None:
    (record,), log = read(tmp_path, [make_row(sents=" "), make_row()])
    assert [region.phrase for region in record.regions] == ["left cat"]
    assert log.counts == {"expression": {"empty_text": 1}}


def test_other_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows.json: expected a JSON list of rows with img_id"):
        read(tmp_path, {"rows": []})


@pytest.mark.parametrize(
    ("name", "num_rows", "num_photos", "num_expressions"),
    [
        ("refcoco_val", 10_834, 78, 546),
        ("refcoco+_val", 10_758, 78, 537),
        ("refcocog_val", 4_896, 85, 305),
    ],
)
def test_real_rows_add_up(
    shared_data: Path, name: str, num_rows: int, num_photos: int, num_expressions: int
) -> None:
    folder = shared_data / "refcoco-mini"
    log = DropLog()
    records = list(read_refcoco(folder / f"{name}.json", folder / "images-val.tar", drop_log=log))
    assert len(records) == num_photos
    assert log.delivered["expression"] == num_expressions
    assert log.delivered["expression"] + log.num_dropped("expression") == num_rows
    assert set(log.counts["expression"]) == {"missing_image"}
